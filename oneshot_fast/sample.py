"""Command line: images of prompts, from any generator, with LoRAs, steps and samplers."""

import dataclasses
import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import UseAppendAction

from oneshot_fast.cli import OK, run_command
from oneshot_fast.data.options import SizeOptions
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.data.records import text_field
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.rewards.options import JudgeModels
from oneshot_fast.runtime.options import RunOptions

# of the model, what a YAML file says nothing of
_BESIDE_CONFIG = ("device", "variant", "revision", "channels_last", "cache_dir")


@dataclass(frozen=True)
class SampleCommand:
    """Make images of prompts: samples.jsonl, images/*.png and grid.png.

    An image depends on the seed and on its prompt's place in the list, never on the batch. With
    --config, an inference file of RTDMD says all of it. An interrupted run goes on when the same
    command is repeated.
    """

    config: Path | None = None
    """RTDMD's YAML file of inference, such as configs/inference/sd35m.yaml."""
    override: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE in place of the YAML file's; may be given several times."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times. It goes before all that the YAML file names."""
    prompt_file: Path | None = None
    """Prompts: .txt with one per line, .tsv or .csv with a header, or .jsonl."""
    prompt_field: str | None = None
    """Column or field of prompt_file; by default the first of prompt, text and caption."""
    model_id: str | None = None
    """Generator: folder in diffusers layout, hub id, .safetensors file, or "tiny"."""
    output_dir: Path | None = None
    """Folder of the results; with --config by default the YAML file's."""
    images_per_prompt: int = 1
    """Images of each prompt, each from a noise of its own."""
    batch_size: int = 4
    """Images that are made at once."""
    lora_alpha: float | None = None
    """Scale times rank of RTDMD's LoRA files, which do not say it; by default twice the rank."""
    reward: UseAppendAction[tuple[str, ...]] = ()
    """NAME of a reward whose scores of the images are written, too; may be given several times."""
    size: SizeOptions = SizeOptions()
    judges: JudgeModels = JudgeModels()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def execute(command: SampleCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    prompts = [text_field({"--prompt": prompt}, "--prompt") for prompt in command.prompt]
    require(command.run.report_to == "none", "--report_to: images go to no tracker; leave it out")
    pipeline = None
    if command.config is not None:
        command, prompts, pipeline = _configured(command, prompts)
    else:
        require(not command.override, "--override has no effect without --config; give it, too")
        if command.prompt_file is not None:
            prompts += read_prompts(command.prompt_file, command.prompt_field)
    require(
        command.prompt_file is not None or command.prompt_field is None,
        "--prompt_field has no effect without --prompt_file; give both",
    )
    if command.model_id is None or command.output_dir is None:
        raise UserError("give --model_id ID and --output_dir DIR, or --config FILE")
    require(bool(prompts), "give --prompt TEXT or --prompt_file FILE")
    alpha, size = command.lora_alpha, command.size.size

    from oneshot_fast.generators.lora_files import LoraFile, check_alpha
    from oneshot_fast.jobs.sample.run import SampleRun

    check_alpha(alpha, [LoraFile.parse(text, alpha) for text in command.model.lora])
    generator = command.model.load(command.model_id, lora_alpha=alpha)
    kind = type(getattr(generator, "pipe", None)).__name__
    require(pipeline in (None, kind), f"{command.model_id} is a {kind}, not a {pipeline}")
    run = SampleRun(
        generator,
        prompts,
        command.output_dir,
        images_per_prompt=command.images_per_prompt,
        resolution=size,
        batch_size=command.batch_size,
        rewards=command.judges.judges(generator.device, command.reward),
        seed=command.run.seed,
    )
    summary = run.run(overwrite=command.run.overwrite, verify=command.run.verify)
    means = "".join(f", mean {name} {value:.4f}" for name, value in summary["means"].items())
    print(f"{summary['samples']} images{means}, in {summary['seconds']:.0f} s: {run.folder}")
    return OK


def _configured(command: SampleCommand, prompts: list[str]) -> tuple[SampleCommand, list[str], str]:
    """The command that a YAML file stands for, its prompts, and the pipeline it is written for."""
    from oneshot_fast.jobs.sample.config import read_config

    assert command.config is not None
    own = {name: getattr(command.model, name) for name in _BESIDE_CONFIG}
    _left_out(command.model, tuple(own))
    beside = ("config", "override", "prompt", "output_dir", "images_per_prompt")
    _left_out(command, (*beside, "size", "judges", "model", "run"))
    _left_out(command.size)
    require(
        command.run.seed == RunOptions.seed, "--seed: with --config give --override seed=N instead"
    )
    found = read_config(command.config, command.override, prompts)
    judges = command.judges
    if found.models_dir is not None:
        judges = replace(judges, models_dir=found.models_dir)
    return (
        replace(
            command,
            model_id=found.model_id,
            output_dir=command.output_dir or found.output_dir,
            size=SizeOptions(found.resolution),
            batch_size=found.batch_size,
            lora_alpha=found.lora_alpha if _needs_alpha(found.model["lora"]) else None,
            reward=found.rewards,
            judges=judges,
            model=ModelOptions(**own, **found.model),
            run=replace(command.run, seed=found.seed),
        ),
        found.prompts,
        found.pipeline,
    )


def _needs_alpha(files: tuple[str, ...]) -> bool:
    from oneshot_fast.generators.lora_files import LoraFile

    return not all(LoraFile.parse(file).has_alpha for file in files)


def _left_out(
    group: SampleCommand | SizeOptions | ModelOptions, names: tuple[str, ...] = ()
) -> None:
    """Refuse flags, all but ``names``, that the YAML file says."""
    for field in dataclasses.fields(group):
        require(
            field.name in names or getattr(group, field.name) == field.default,
            f"--{field.name}: with --config give --override KEY=VALUE instead",
        )


main = functools.partial(run_command, "sample", SampleCommand, execute)

if __name__ == "__main__":
    sys.exit(main())

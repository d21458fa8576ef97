"""Command line: images of prompts, from any generator, with LoRAs, steps and samplers."""

import dataclasses
import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import UseAppendAction

from oneshot_fast.cli import OK, SOME_FAILED, run_command
from oneshot_fast.data.options import SizeOptions
from oneshot_fast.data.prompts import named_prompts
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.rewards.options import JudgeModels
from oneshot_fast.runtime.options import RunOptions

# flags that a YAML file says, and its keys
_BY_CONFIG = {
    "model_id": "pretrained_path", "batch_size": "batch_size", "lora_alpha": "lora_alpha",
    "reward": "reward_fn", "resolution": "image_resolution", "seed": "seed", "dtype": "dtype",
    "lora": "lora_paths", "num_inference_steps": "num_steps",
    "step_list": "denoising_step_list", "guidance_scale": "guidance_scale",
    "embedded_guidance": "guidance_scale", "cps_eta": "cps_eta",
}  # fmt: skip


@dataclass(frozen=True)
class SampleCommand:
    """Make images of prompts: samples.jsonl, images/*.png and grid.png.

    An image depends on the seed and on its prompt's place in the list; on the batch, only by
    rounding. With --config, an inference file of RTDMD says most of it. An interrupted run goes on
    when the same command is repeated.
    """

    config: Path | None = None
    """RTDMD's YAML file of inference, such as configs/inference/sd35m.yaml."""
    override: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE in place of the YAML file's; may be given several times."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times. It goes before those of prompt_file; with --config
    both are in place of all that the YAML file names."""
    prompt_file: Path | None = None
    """Prompts: .txt with one per line, .tsv or .csv with a header, .jsonl or .json."""
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
    """Scale times rank of RTDMD's LoRA files that do not say it; by default twice the rank."""
    reward: UseAppendAction[tuple[str, ...]] = ()
    """NAME of a reward whose scores of the images are written, too; may be given several times."""
    size: SizeOptions = SizeOptions()
    judges: JudgeModels = JudgeModels()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def execute(command: SampleCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    require(command.run.report_to == "none", "--report_to: images go to no tracker; leave it out")
    for flag in ("backprop_steps", "decoder_checkpointing"):
        is_usual = getattr(command.model, flag) == getattr(ModelOptions, flag)
        require(is_usual, f"--{flag} is for gradients, and nothing here has any; leave it out")
    of_file, pipeline, guidance = command.config is not None, None, None
    require(
        of_file or not command.override,
        "--override has no effect without --config; give it, too",
    )
    named = command.prompt, command.prompt_file, command.prompt_field
    prompts = named_prompts(*named) if any(named) else []
    if of_file:
        command, prompts, pipeline, guidance = _configured(command, prompts)
    if command.model_id is None or command.output_dir is None:
        raise UserError("give --model_id ID and --output_dir DIR, or --config FILE")
    require(bool(prompts), "give --prompt TEXT or --prompt_file FILE")
    alpha, size = command.lora_alpha, command.size.size

    from oneshot_fast.generators.base import LoadOptions
    from oneshot_fast.generators.loading import find_family
    from oneshot_fast.generators.lora_files import LoraFile, check_alpha
    from oneshot_fast.jobs.sample.run import SampleRun

    check_alpha(alpha, [LoraFile.parse(text, alpha) for text in command.model.lora])
    if pipeline is not None:
        options = LoadOptions(revision=command.model.revision)
        family = getattr(find_family(command.model_id, options)[0], "pipeline", object)
        kind = family.__name__
        require(kind == pipeline, f"{command.model_id} is a {kind}, not a {pipeline}")
    generator = command.model.load(command.model_id, lora_alpha=alpha)
    if guidance is not None and getattr(generator, "embeds_guidance", False):  # schnell is not told
        generator.embedded_guidance = guidance  # type: ignore[attr-defined]
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
    if summary["failed"]:
        print(f"{summary['failed']} failed: {run.folder / 'failures.jsonl'}", file=sys.stderr)
        return SOME_FAILED
    return OK


def _configured(
    command: SampleCommand, prompts: list[str]
) -> tuple[SampleCommand, list[str], str, float | None]:
    """The command that a YAML file stands for, its prompts, and the pipeline it is written for.

    The last is the guidance that a model that embeds it is told.
    """
    from oneshot_fast.jobs.sample.config import read_config

    assert command.config is not None
    for group in (command, command.size, command.run, command.model):
        for field in dataclasses.fields(group):
            key = _BY_CONFIG.get(field.name)
            require(
                key is None or getattr(group, field.name) == field.default,
                f"--{field.name}: with --config give --override {key}=VALUE instead",
            )
    by_sides = command.size.size is not None
    found = read_config(command.config, command.override, prompts)
    judges = command.judges
    if found.models_dir is not None:
        judges = replace(judges, models_dir=found.models_dir)
    return (
        replace(
            command,
            model_id=found.model_id,
            output_dir=command.output_dir or found.output_dir,
            size=command.size if by_sides else SizeOptions(found.resolution),
            batch_size=found.batch_size,
            lora_alpha=found.lora_alpha if _needs_alpha(found.model["lora"]) else None,
            reward=found.rewards,
            judges=judges,
            model=replace(command.model, **found.model),
            run=replace(command.run, seed=found.seed),
        ),
        found.prompts,
        found.pipeline,
        found.guidance,
    )


def _needs_alpha(files: tuple[str, ...]) -> bool:
    from oneshot_fast.generators.lora_files import LoraFile

    return not all(LoraFile.parse(file).has_alpha for file in files)


main = functools.partial(run_command, "sample", SampleCommand, execute)

if __name__ == "__main__":
    sys.exit(main())

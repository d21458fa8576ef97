"""Command line: reinforce a few-step generator by rewards, near its teacher."""

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from oneshot_fast.cli import OK, finish, run_command
from oneshot_fast.data.options import SizeOptions
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.reinforce.options import ReinforceOptions
from oneshot_fast.rewards.options import MeasureOptions, RewardOptions
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.training.options import RolesKeepOptions


@dataclass(frozen=True)
class ReinforceCommand:
    """Raise rewards of a few-step generator's images, by the gradient of its noisy steps' policy.

    SubGRPO on some of the steps that draw noise, which needs no gradient of the reward, the last
    step's own gradient by --final_reward_weight, and a matching term that holds the generator near
    its --teacher (RTDMD). An interrupted run resumes when the same command is repeated.
    """

    model_id: str | None = None
    """Few-step generator, such as checkpoint-final of distill: folder in diffusers layout, hub id,
    or a packaged model."""
    teacher: str | None = None
    """Many-step model of the same shape, for --match_weight: its denoiser is taken. --revision,
    --model_config, --timestep, --lora and the decoder's flags are not for it. Without it,
    --model_id is the many-step model, --lora the files that make it the generator, such as
    distill's lora-final, and --lora_rank trains another one beside them: one network in memory."""
    prompt_file: Path | None = None
    """Prompts: .txt with one per line, .tsv or .csv with a header, or .jsonl."""
    prompt_field: str | None = None
    """Column or field of prompt_file; by default the first of prompt, text and caption."""
    output_dir: Path | None = None
    """Folder of the results."""
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed, from a few timed passes and
    rollouts; nothing is written."""
    size: SizeOptions = SizeOptions()
    training: ReinforceOptions = ReinforceOptions()
    rewards: RewardOptions = RewardOptions()
    measure: MeasureOptions = MeasureOptions()
    model: ModelOptions = ModelOptions()
    keep: RolesKeepOptions = RolesKeepOptions()
    run: RunOptions = RunOptions()


def execute(command: ReinforceCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    if command.model_id is None or command.prompt_file is None:
        raise UserError("give --model_id ID and --prompt_file FILE")
    if command.output_dir is None and not command.dry_run:
        raise UserError("give --output_dir DIR")
    require(bool(command.rewards.reward), "give --reward NAME[:WEIGHT]")

    command.measure.check(command.rewards.reward)
    command.training.check()
    model, size = command.model, command.size.size
    require(model.guidance_scale == 1, "--guidance_scale: RL knows no guidance; leave it out")
    prompts = read_prompts(command.prompt_file, command.prompt_field)
    command.training.check_prompts(prompts)

    from oneshot_fast.generators.few_step import FewStepGenerator
    from oneshot_fast.generators.pipeline import PipelineGenerator
    from oneshot_fast.jobs.reinforce.run import ReinforceRun

    training = command.training
    stack = training.match_weight > 0 and training.lora_rank > 0 and command.teacher is None

    def load(name: str, master_weights: bool, model: ModelOptions, **how: bool) -> FewStepGenerator:
        found = model.load(name, master_weights=master_weights, **how)
        if isinstance(found, FewStepGenerator):
            return found
        if not isinstance(found, PipelineGenerator):
            raise UserError(f"{name} is no pipeline of diffusers, which takes several steps")
        return FewStepGenerator.over(found, 1)

    master_weights = training.weights_dtype == "float32"
    generator = load(command.model_id, master_weights, model, stack=stack)
    generator.recompute(command.rewards.recomputed(generator.device))
    # what is said of the generator's files and decoder is not of its
    of_teacher = replace(
        model, lora=(), revision=None, model_config=None, timestep=None, decoder_id=None,
        decoder_dtype="auto", decoder_checkpointing=False, decoder_tiling=0, cache_dir=None,
    )  # fmt: skip
    run = ReinforceRun(
        generator,
        prompts,
        command.output_dir or Path(),
        command.training,
        teacher=None if command.teacher is None else load(command.teacher, False, of_teacher),
        rewards=command.rewards.rewards(generator.device),
        judge=command.rewards.judges(generator.device, command.measure.judge),
        resolution=size,
        eval_samples=command.measure.eval_samples,
        names=[*command.rewards.names, *(f"judge {name}" for name in command.measure.judge)],
        seed=command.run.seed,
        **command.keep.arguments(generator.device, command.dry_run),
    )
    if command.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**command.run.arguments)

    from oneshot_fast.report.reinforce import print_summary, write_reinforce_report

    return finish(command, run.folder, summary, write_reinforce_report, print_summary, "")


main = functools.partial(run_command, "reinforce", ReinforceCommand, execute)

if __name__ == "__main__":
    sys.exit(main())

"""Command line: distil a many-step teacher into a student of 1 to 8 steps."""

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from oneshot_fast.cli import OK, finish, run_command
from oneshot_fast.data.options import SizeOptions
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.data.records import Record
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.distill.options import DistillOptions
from oneshot_fast.rewards.options import JudgeModels, MeasureOptions
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.training.options import RolesKeepOptions


@dataclass(frozen=True)
class DistillCommand:
    """Teach a model to make in --num_inference_steps steps what it makes in many, with guidance.

    AC-DMD, or DMD: a second network follows the student's samples, and the student goes where the
    teacher's and that network's estimates differ. With --lora_rank all three are one network and
    two adapters. An interrupted run resumes when the same command is repeated.
    """

    teacher: str | None = None
    """Many-step model of SDXL's, SD's, SD3's or FLUX's shape: folder in diffusers layout, hub id,
    or "tiny-teacher". The student begins as it is."""
    prompt_file: Path | None = None
    """Prompts: .txt with one per line, .tsv or .csv with a header, or .jsonl."""
    prompt_field: str | None = None
    """Column or field of prompt_file; by default the first of prompt, text and caption."""
    output_dir: Path | None = None
    """Folder of the results."""
    images_per_prompt: int = 8
    """Images of each prompt in an epoch, each from a new noise."""
    heldout_root: Path | None = None
    """Images, in the format of assign's data_root, that the student's are compared with."""
    features: str | None = None
    """With --heldout_root: what images are compared by, see evaluate --help."""
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed, from a few timed passes on random
    data; nothing is written."""
    size: SizeOptions = SizeOptions()
    training: DistillOptions = DistillOptions()
    judges: JudgeModels = JudgeModels()
    measure: MeasureOptions = MeasureOptions()
    model: ModelOptions = ModelOptions()
    keep: RolesKeepOptions = RolesKeepOptions()
    run: RunOptions = RunOptions()


def execute(command: DistillCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    if command.teacher is None or command.prompt_file is None:
        raise UserError("give --teacher ID and --prompt_file FILE")
    if command.output_dir is None and not command.dry_run:
        raise UserError("give --output_dir DIR")
    require(
        command.features is None or command.heldout_root is not None,
        "--features has no effect without --heldout_root; give it, too",
    )
    command.training.check()
    model, size = command.model, command.size.size
    require(model.guidance_scale == 1, "--guidance_scale: the student does without; leave it out")
    require(
        model.embedded_guidance is None,
        "--embedded_guidance: the student is told 1, the teacher --teacher_guidance; leave it out",
    )
    require(
        model.backprop_steps is None,
        "--backprop_steps: the last step alone is differentiated here; leave it out",
    )
    require(model.timestep is None, "--timestep: a student begins at the noisiest; leave it out")
    if model.num_inference_steps > 1 and model.cps_eta is None:
        model = replace(model, cps_eta=0.9)
    prompts = read_prompts(command.prompt_file, command.prompt_field)
    heldout = []
    if command.heldout_root is not None:
        heldout = [item for item in open_pairs(command.heldout_root) if isinstance(item, Record)]
        require(bool(heldout), f"--heldout_root {command.heldout_root}: no image can be read")

    from oneshot_fast.generators.few_step import FewStepGenerator
    from oneshot_fast.jobs.distill.run import DistillRun

    master_weights = command.training.weights_dtype == "float32"
    generator = model.load(command.teacher, master_weights=master_weights, student=True)
    assert isinstance(generator, FewStepGenerator)
    device = generator.device
    run = DistillRun(
        generator,
        prompts,
        command.output_dir or Path(),
        command.training,
        images_per_prompt=command.images_per_prompt,
        heldout=heldout,
        features=command.features,
        setup=command.judges.setup(device),
        judge=command.judges.judges(device, command.measure.judge),
        resolution=size,
        eval_samples=command.measure.eval_samples,
        names=[f"judge {name}" for name in command.measure.judge],
        seed=command.run.seed,
        **command.keep.arguments(device, command.dry_run),
    )
    if command.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**command.run.arguments)

    from oneshot_fast.report.distill import print_summary, write_distill_report

    return finish(command, run.folder, summary, write_distill_report, print_summary, "")


main = functools.partial(run_command, "distill", DistillCommand, execute)

if __name__ == "__main__":
    sys.exit(main())

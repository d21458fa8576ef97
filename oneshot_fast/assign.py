"""Command line of the E-step: one target or a whole data set."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from oneshot_fast.cli import OK, finish, run_command
from oneshot_fast.data.image_refs import hint
from oneshot_fast.data.options import DataOptions
from oneshot_fast.data.records import Record, pair_id, text_field
from oneshot_fast.data.sources import FolderSource, Source, open_pairs
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.runtime.options import RunOptions


@dataclass(frozen=True)
class AssignCommand:
    """Find, for each (prompt, target image), the noise that the generator maps closest to it.

    One target: --prompt and --target_image_path. A data set: --data_root. An interrupted run
    resumes when the same command is repeated.
    """

    prompt: str | None = None
    """Prompt of a single target."""
    target_image_path: Path | None = None
    """Image of a single target."""
    model_id: str = "stabilityai/sdxl-turbo"
    """Generator: folder in diffusers layout, hub id, .safetensors file, "tiny" or "tiny-teacher",
    which takes several steps."""
    output_dir: Annotated[Path | None, arg(aliases=["--output_root"])] = None
    """Folder of the results."""
    batch_size: int | Literal["auto"] = "auto"
    """Targets solved at once; a result does not depend on it beyond rounding. auto is the largest
    power of two that fits on a GPU, and 16 on the CPU, which has no device memory to fill."""
    engine: Literal["local", "ray"] = "local"
    """local: this process, or those of accelerate launch and torchrun. ray: a Ray Data pipeline on
    the Ray cluster of this machine, or else on this machine alone, with an actor per GPU."""
    ray_actors: int | None = None
    """--engine ray: actors; by default one per GPU, without GPUs one per CPU core."""
    num_images: int = 16
    """Targets whose images before and after are saved and shown in the report; -1 for all."""
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed, from a few timed steps on random
    targets; nothing is written."""
    search: AssignOptions = AssignOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def open_data(command: AssignCommand) -> Source:
    """The data set, or the single target, that the command line names."""
    single = command.prompt is not None or command.target_image_path is not None
    if command.data.data_root is not None:
        require(not single, "give either --data_root or a single target, not both")
        return open_pairs(command.data.data_root, command.data)
    path, prompt = command.target_image_path, command.prompt
    if path is None or prompt is None:
        raise UserError("give --data_root DIR, or both --prompt TEXT and --target_image_path FILE")
    prompt = text_field({"--prompt": prompt}, "--prompt")
    require(path.is_file(), f"no such image: {path}{hint(str(path), Path())}")
    record = Record(pair_id(path.name, prompt), 1, prompt, path.name, path.resolve())
    return FolderSource([record], [])


def execute(command: AssignCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    folder = command.output_dir
    if folder is None and not command.dry_run:
        raise UserError("give --output_dir DIR")
    command.search.check()
    command.data.check()
    source = open_data(command)
    more: dict[str, Any] = {
        "folder": folder or Path(),
        "options": command.search,
        "seed": command.run.seed,
        "batch_size": command.batch_size,
        "resize_mode": command.data.resize_mode,
        "bucket_step": command.data.bucket_step,
        "resolution": command.data.size,
        "num_images": command.num_images,
    }
    if folder is None or command.dry_run or command.engine == "local":
        generator = command.model.load(command.model_id)
        run = AssignRun(generator, source, **more)
        if folder is None or command.dry_run:
            print(run.plan())
            return OK
        summary = run.run(**command.run.arguments)
    else:
        from oneshot_fast.jobs.assign.ray_driver import run_on_ray
        from oneshot_fast.jobs.assign.ray_worker import Job

        job = Job(command.model, command.model_id, more | {"folder": folder.absolute()})
        summary = run_on_ray(job, source, actors=command.ray_actors, **command.run.arguments)

    from oneshot_fast.report.assign import print_summary, write_assign_report

    return finish(command, folder, summary, write_assign_report, print_summary)


main = functools.partial(run_command, "assign", AssignCommand, execute)

if __name__ == "__main__":
    sys.exit(main())

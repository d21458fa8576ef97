"""The packaged teacher distilled to few steps, in minutes on a CPU."""

from pathlib import Path
from typing import Any

from oneshot_fast.embedded.digits import prompt_of
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.distill.options import DistillOptions
from oneshot_fast.jobs.distill.run import DistillRun

PROMPTS = [prompt_of(digit) for digit in range(10)]
# AC-DMD without its consistency term
SETTINGS: dict[str, Any] = {
    "lr": 5e-5, "fake_lr": 1e-4, "ttur": 5, "teacher_guidance": 2.0, "consistency_weight": 0.0,
}  # fmt: skip


def distilled(steps: int, updates: int, batch_size: int, folder: Path, seed: int = 0) -> Path:
    """Folder of a student of so many steps after so many updates of so many images.

    It is in ``folder``, where what is interrupted goes on, and what is finished is kept.
    """
    eta = 0.9 if steps > 1 else None
    teacher: Any = load_generator("tiny-teacher")
    student = FewStepGenerator.over(teacher, steps, eta=eta)
    each = min(updates, 240 // batch_size)  # of an epoch
    options = DistillOptions(epochs=updates // each, batch_size=batch_size, **SETTINGS)
    DistillRun(
        student, PROMPTS, folder, options, images_per_prompt=batch_size * each // len(PROMPTS),
        eval_samples=20, seed=seed, save_minutes=1,
    ).run()  # fmt: skip
    return folder / "checkpoint-final"

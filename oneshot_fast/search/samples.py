"""The images that a job makes of prompts, and the seeds of their noises."""

from collections.abc import Sequence
from dataclasses import dataclass

from oneshot_fast.errors import require
from oneshot_fast.runtime.seeds import derived_seed


@dataclass(frozen=True)
class Sample:
    """One image to make: its name, place in the run, prompt and the seed of its base noise."""

    id: str
    index: int
    prompt: str
    seed: int

    def seed_of(self, k: int) -> int:
        """Of candidate ``k``; the first is the base noise."""
        return derived_seed(self.seed, "candidate", k) if k else self.seed


def check_count(images_per_prompt: int, seeds: Sequence[int]) -> None:
    """Raise UserError unless images of a prompt are counted by a number, or by their seeds."""
    count = images_per_prompt
    require(count >= 1, f"num_images_per_prompt is {count}; give at least 1")
    require(
        count == 1 or not seeds,
        "--num_images_per_prompt has no effect with --seeds, one for each image; leave one out",
    )


def samples_of(
    prompts: Sequence[str], images_per_prompt: int, seed: int, seeds: Sequence[int] = ()
) -> list[Sample]:
    """The images to make, prompt by prompt; ``seeds`` go before those that follow from ``seed``."""
    check_count(images_per_prompt, seeds)
    found: list[Sample] = []
    for k, prompt in enumerate(prompts):
        for j in range(len(seeds) or images_per_prompt):
            own = seeds[j] if seeds else derived_seed(seed, "optimize", k, prompt, j)
            found.append(Sample(f"{k:05d}-{j:02d}", len(found), prompt, own))
    return found

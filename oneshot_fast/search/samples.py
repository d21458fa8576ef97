"""The images that a job makes of prompts, and the seeds of their noises."""

from collections.abc import Sequence
from dataclasses import dataclass

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


def samples_of(
    prompts: Sequence[str], images_per_prompt: int, seed: int, seeds: Sequence[int] = ()
) -> list[Sample]:
    """The images to make, prompt by prompt; ``seeds`` go before those that follow from ``seed``."""
    found: list[Sample] = []
    for k, prompt in enumerate(prompts):
        for j in range(len(seeds) or images_per_prompt):
            own = seeds[j] if seeds else derived_seed(seed, "optimize", k, prompt, j)
            found.append(Sample(f"{k:05d}-{j:02d}", len(found), prompt, own))
    return found

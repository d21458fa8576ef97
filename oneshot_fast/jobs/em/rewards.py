"""The main job by rewards: search noises that score high, train on the images found, repeat.

The E-step is a noise optimisation with the generator as it is (best-of-K is RAFT, Dong et al. 2023,
arXiv 2304.06767; gradients amortise their own search), the M-step an ordinary training on random
noise with the images found. Every stage is the resumable run of its own command.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.data.found_pairs import MANIFEST
from oneshot_fast.errors import require
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, all_scores
from oneshot_fast.generators.base import Generator, Recomputed
from oneshot_fast.jobs.em.cycles import Cycles, name_of
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.optimize.run import OptimizeRun
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.seeds import content_id


class RewardEmRun(Cycles):
    """EM on prompts and rewards, without targets."""

    by_reward = True

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: str | Path,
        options: EmOptions,
        *,
        rewards: WeightedRewards,
        judge: WeightedRewards | None = None,
        images_per_prompt: int = 8,
        names: Sequence[str] = (),
        recompute: Recomputed = "none",
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to align, in place; float32 weights.
            prompts: Of the images.
            folder: Where everything is written.
            options: How the steps alternate, and how each works.
            rewards: What the searches raise.
            judge: Rewards that are measured, too, but not raised.
            images_per_prompt: Random noises of each prompt, new ones in every cycle.
            names: How rewards and judges were named, for the run's settings.
            recompute: Activations that searches recompute, see ``Generator.recompute``.
            **more: As for ``Cycles``.

        Raises:
            UserError: If an option makes no sense, or is for targets only.
        """
        super().__init__(generator, prompts, folder, options, **more)
        require(images_per_prompt >= 1, "images_per_prompt must be at least 1")
        self.rewards, self.judge, self.names = rewards, judge, list(names)
        self.images_per_prompt, self.recompute = images_per_prompt, recompute
        for cycle in range(1, len(self.options.schedule()) + 1):
            self.searcher(cycle, self.folder)  # checks its options before any long work

    def describe(self) -> dict[str, Any]:
        return {
            "rewards": self.names,
            "images_per_prompt": self.images_per_prompt,
            "samples": len(self.prompts) * self.images_per_prompt,
            "prompts": content_id(*self.prompts),
        }

    def measure(self) -> RandomNoiseMeasure:
        if self.judge is not None:
            self.judge.warn_of_cut(self.prompts)
        more = self.measuring(scores=all_scores(self.rewards, self.judge))
        return RandomNoiseMeasure(self.prompts, self.noise_shape, **more)

    def first(self) -> OptimizeRun:
        return self.searcher(1, self.folder)

    def searcher(self, cycle: int, folder: Path, seed: int = 0) -> OptimizeRun:
        """The E-step of a cycle, from 1."""
        return OptimizeRun(
            self.generator,
            self.prompts,
            folder,
            self.options.optimize(cycle),
            rewards=self.rewards,
            reward_names=self.names,
            images_per_prompt=self.images_per_prompt,
            batch_size=self.options.assign_batch_size,
            seed=seed,
            resolution=self.targets.size,
        )

    def e_step(self, cycle: int, seed: int) -> tuple[Path, dict[str, Any]]:
        self.generator.recompute(self.recompute)  # an M-step ends it
        folder = self.folder / name_of(cycle) / "assign"
        found = self.complete(self.searcher(cycle, folder, seed))
        return folder / MANIFEST, {
            "search": {name: found[name] for name in ("initial_reward", "best_reward")},
            "failed": found["failed"],
        }

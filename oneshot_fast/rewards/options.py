"""By what images are judged: the flags of every command that takes rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import UseAppendAction

from oneshot_fast.errors import require
from oneshot_fast.rewards import Setup, WeightedRewards, identity, load_rewards, parse_reward


@dataclass(frozen=True)
class JudgeModels:
    """Where the models are that judge images, and how they compute."""

    models_dir: Path = Path("models")
    """Folder of the models of rewards and features, see python -m oneshot_fast.download."""
    reward_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the rewards' networks compute in; auto is float32 on the CPU, bfloat16 on a GPU."""

    def load(
        self, device: torch.device, specs: Sequence[str], checkpointing: bool = False
    ) -> WeightedRewards:
        """Load the rewards called ``specs`` onto ``device``."""
        name = self.reward_dtype
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        return load_rewards(
            specs,
            models_dir=self.models_dir,
            device=device,
            dtype=getattr(torch, name),
            checkpointing=checkpointing,
        )

    def judges(self, device: torch.device, specs: Sequence[str]) -> WeightedRewards | None:
        """The rewards called ``specs``, which are only measured; None if there is none."""
        return self.load(device, specs) if specs else None

    def setup(self, device: torch.device) -> Setup:
        """Where features find their models; they compute in float32."""
        return Setup(self.models_dir, device, torch.float32)


@dataclass(frozen=True)
class RewardOptions(JudgeModels):
    """By what images are judged."""

    reward: UseAppendAction[tuple[str, ...]] = ()
    """NAME[:WEIGHT], such as clip:0.01, python:module.function[:WEIGHT], or the folder of a reward
    that `scale train_reward` trained; may be given several times: the weighted sum is raised."""
    checkpointing: Literal["auto", "none", "rewards", "full"] = "auto"
    """Recompute in the backward pass instead of keeping activations: of rewards and decoder, or
    (full) of the denoiser, too; auto: rewards on a GPU, none on the CPU."""

    def rewards(self, device: torch.device) -> WeightedRewards:
        """Load the rewards onto ``device``."""
        return self.load(device, self.reward, self.recomputed(device) != "none")

    def recomputed(self, device: torch.device) -> Literal["none", "rewards", "full"]:
        """``checkpointing`` on ``device``: what ``Generator.recompute`` takes."""
        if self.checkpointing == "auto":
            return "rewards" if device.type == "cuda" else "none"
        return self.checkpointing

    @property
    def searched(self) -> RewardOptions:
        """These options without those that judges have, too: what needs --reward."""
        return replace(self, models_dir=JudgeModels.models_dir, reward_dtype="auto")

    @property
    def names(self) -> list[str]:
        """How the rewards were named and computed, for a run's settings."""
        return [*map(identity, self.reward), f"computed in {self.reward_dtype}"]


@dataclass(frozen=True)
class JudgeOptions:
    """By what a training on rewards is judged."""

    judge: UseAppendAction[tuple[str, ...]] = ()
    """NAME of a reward that is measured and never trained on, and so tells whether rewards are
    over-optimised; may be given several times."""

    def check(self, rewards: Sequence[str]) -> None:
        """Raise UserError if a judge is among the ``rewards`` that are trained on."""
        trained = {parse_reward(spec)[0] for spec in rewards}
        both = sorted(trained.intersection(parse_reward(spec)[0] for spec in self.judge))
        require(
            not both,
            f"{', '.join(both)} cannot judge what is trained on it; name another --judge",
        )


@dataclass(frozen=True)
class MeasureOptions(JudgeOptions):
    """What is measured as the training goes."""

    eval_samples: int = 64
    """Random noises, not trained on, on which what is trained is measured before training and after
    every epoch."""


@dataclass(frozen=True)
class RewardTrainingOptions(JudgeOptions):
    """Training on rewards: of which images, and what is measured."""

    prompt_file: Path | None = None
    """With --reward, prompts: .txt with one per line, .tsv or .csv with a header, or .jsonl."""
    images_per_prompt: int = 8
    """With --reward: random noises of each prompt, new ones in every epoch or cycle."""

"""By what images are judged: the flags of every command that takes rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import UseAppendAction

from oneshot_fast.errors import require
from oneshot_fast.rewards import WeightedRewards, load_rewards, parse_reward


@dataclass(frozen=True)
class RewardOptions:
    """By what images are judged."""

    reward: UseAppendAction[tuple[str, ...]] = ()
    """NAME[:WEIGHT], such as clip:0.01, or python:module.function[:WEIGHT]; may be given several
    times: the weighted sum is raised."""
    models_dir: Path = Path("models")
    """Folder of the rewards' models, see python -m oneshot_fast.download."""
    reward_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the rewards' networks compute in; auto is float32 on the CPU, bfloat16 on a GPU."""
    checkpointing: Literal["auto", "none", "rewards", "full"] = "auto"
    """Recompute in the backward pass instead of keeping activations: of rewards and decoder, or
    (full) of the denoiser, too; auto: rewards on a GPU, none on the CPU."""

    def load(self, device: torch.device, specs: Sequence[str] | None = None) -> WeightedRewards:
        """Load the rewards onto ``device``, or those of ``specs``, such as judges."""
        name = self.reward_dtype
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        return load_rewards(
            self.reward if specs is None else specs,
            models_dir=self.models_dir,
            device=device,
            dtype=getattr(torch, name),
            checkpointing=self.recomputed(device) != "none",
        )

    def recomputed(self, device: torch.device) -> Literal["none", "rewards", "full"]:
        """``checkpointing`` on ``device``: what ``Generator.recompute`` takes."""
        if self.checkpointing == "auto":
            return "rewards" if device.type == "cuda" else "none"
        return self.checkpointing

    @property
    def names(self) -> list[str]:
        """How the rewards were named and computed, for a run's settings."""
        return [*self.reward, f"computed in {self.reward_dtype}"]


@dataclass(frozen=True)
class RewardTrainingOptions:
    """Training on rewards: of which images, and what is measured."""

    prompt_file: Path | None = None
    """With --reward, prompts: .txt with one per line, .tsv or .csv with a header, or .jsonl."""
    images_per_prompt: int = 8
    """With --reward: random noises of each prompt, new ones in every epoch or cycle."""
    judge: UseAppendAction[tuple[str, ...]] = ()
    """With --reward: NAME of a reward that is measured but not trained on, and so tells whether
    the others are over-optimised; may be given several times."""

    def check(self, rewards: Sequence[str]) -> None:
        """Raise UserError if a judge is among the ``rewards`` that are trained on."""
        trained = {parse_reward(spec)[0] for spec in rewards}
        both = sorted(trained.intersection(parse_reward(spec)[0] for spec in self.judge))
        require(
            not both, f"{', '.join(both)} cannot judge what is trained on it; name another --judge"
        )

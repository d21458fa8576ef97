"""Rewards: scores of images that say how good they are, and for their prompts how fitting.

``load_rewards(["clip:0.01", "hpsv2:5"])`` gives their weighted sum. A reward is one class in one
file here; the table below names them all, and each is imported when it is first asked for.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.errors import UserError
from oneshot_fast.rewards.base import ImageEncoder, Reward, Setup, WeightedRewards

__all__ = [
    "REWARDS", "ImageEncoder", "Reward", "Setup", "WeightedRewards", "load_rewards", "parse_reward",
]  # fmt: skip

# name -> module and class; the class has load(name, setup)
REWARDS = {
    "aesthetic": "aesthetic.AestheticReward",
    "clip": "clip.ClipReward",
    "digit": "digit.DigitReward",
    "hpsv2": "hpsv2.HpsReward",
    "hpsv2.0": "hpsv2.HpsReward",
    "hpsv2.1": "hpsv2.HpsReward",
    "hybrid": "hybrid.HybridReward",
    "imagereward": "imagereward.ImageRewardReward",
    "pickscore": "pickscore.PickScoreReward",
    "python": "python.PythonReward",
    "thickness": "thickness.ThicknessReward",
}


def parse_reward(spec: str) -> tuple[str, float]:
    """Name and weight of ``name[:weight]`` or ``python:module.function[:weight]``; weight 1.

    Raises:
        UserError: If the name is none of ours or the weight no finite number.
    """
    kind, _, weight = spec.partition(":")
    name = kind
    if kind == "python":
        function, _, weight = weight.partition(":")
        name = f"python:{function}"
    if kind not in REWARDS or name == "python:":
        known = ", ".join(sorted(REWARDS.keys() - {"python"}))
        raise UserError(f"no reward {spec!r}; there are {known} and python:module.function")
    try:
        value = float(weight or 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"weight {weight!r} of reward {name} is no number; write {name}:0.5")
    return name, value


def load_rewards(
    specs: Sequence[str],
    *,
    models_dir: Path = Path("models"),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> WeightedRewards:
    """Load rewards, frozen and in evaluation mode.

    Args:
        specs: ``name[:weight]`` each, or ``python:module.function[:weight]``.
        models_dir: Folder of downloaded models.
        device: Where they compute.
        dtype: Type of their networks.
        checkpointing: Recompute each reward in the backward pass, for less memory.

    Raises:
        UserError: If a name is unknown or comes twice, or a model is missing or damaged.
    """
    setup = Setup(Path(models_dir), torch.device(device), dtype)
    chosen = [(_load(name, setup), weight) for name, weight in map(parse_reward, specs)]
    return WeightedRewards(chosen, checkpointing=checkpointing).eval().requires_grad_(False)


def _load(name: str, setup: Setup) -> Reward:
    module, _, class_name = REWARDS[name.partition(":")[0]].partition(".")
    found: Any = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    return found.load(name, setup)

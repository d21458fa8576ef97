"""Rewards: scores of images that say how good they are, and for their prompts how fitting.

``load_rewards(["clip:0.01", "hpsv2:5"])`` gives their weighted sum. A reward is one class in one
file here; the table below names them all, and each is imported when it is first asked for. The
folder of a reward that `scale train_reward` trained is a name, too.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.errors import UserError
from oneshot_fast.rewards.base import ImageEncoder, Reward, Setup, WeightedRewards
from oneshot_fast.runtime.seeds import content_id

__all__ = [
    "REWARDS", "ImageEncoder", "Reward", "Setup", "WeightedRewards", "identity", "load_reward",
    "load_rewards", "parse_reward",
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
TRAINED = "noise_aware.NoiseAwareReward"  # of a folder
CONFIG = "reward.json"  # in that folder; it names all else that is read


def parse_reward(spec: str) -> tuple[str, float]:
    """Name and weight of ``name[:weight]`` or ``python:module.function[:weight]``; weight 1.

    A name that is none of ours may be a folder of `scale train_reward`.

    Raises:
        UserError: If the name is none of ours or the weight no finite number.
    """
    kind, _, weight = spec.partition(":")
    name = kind
    if kind == "python":
        function, _, weight = weight.partition(":")
        name = f"python:{function}"
    if (kind not in REWARDS and not Path(kind).is_dir()) or name in ("python:", ""):
        known = ", ".join(sorted(REWARDS.keys() - {"python"}))
        raise UserError(
            f"no reward {spec!r}; there are {known}, python:module.function, and folders of "
            "`scale train_reward`"
        )
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
    chosen = [(load_reward(name, setup), weight) for name, weight in map(parse_reward, specs)]
    return WeightedRewards(chosen, checkpointing=checkpointing).eval().requires_grad_(False)


def load_reward(name: str, setup: Setup) -> Reward:
    """The reward called ``name``, as ``parse_reward`` returns it; see ``load_rewards``."""
    place = REWARDS.get(name.partition(":")[0], TRAINED)
    module, _, class_name = place.partition(".")
    found: Any = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    return found.load(name, setup)


def identity(spec: str) -> str:
    """``spec`` for a run's settings: with what a folder of a trained reward has in it."""
    name, _ = parse_reward(spec)
    file = Path(name) / CONFIG
    if name.partition(":")[0] in REWARDS or not file.is_file():
        return spec
    return f"{spec} ({content_id(file.read_text(encoding='utf-8'))})"

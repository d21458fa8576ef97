"""Align one-step text-to-image generators with data: native ops, assignment, training, EM.

``import oneshot_fast as osf`` loads torch and the ops; every other name of this module is imported
when it is first asked for. docs/api.md shows them at work.
"""

import importlib
import importlib.metadata
import itertools
from typing import TYPE_CHECKING, Any

import torch

from oneshot_fast import _C, ops
from oneshot_fast.noise.rotation_adam import RotationAdam

if TYPE_CHECKING:
    from oneshot_fast.data.manifests import read_manifest
    from oneshot_fast.data.sources import open_pairs
    from oneshot_fast.evaluation.measures import frechet_distance
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.generators.few_step import FewStepGenerator
    from oneshot_fast.generators.loading import OneStepGenerator
    from oneshot_fast.jobs.assign.in_memory import assign_noise
    from oneshot_fast.jobs.assign.options import AssignOptions
    from oneshot_fast.jobs.assign.run import AssignRun
    from oneshot_fast.jobs.distill.options import DistillOptions
    from oneshot_fast.jobs.distill.run import DistillRun
    from oneshot_fast.jobs.em.options import EmOptions
    from oneshot_fast.jobs.em.rewards import RewardEmRun
    from oneshot_fast.jobs.em.targets import EmRun
    from oneshot_fast.jobs.evaluate.run import EvaluateRun
    from oneshot_fast.jobs.optimize.in_memory import optimize_noise
    from oneshot_fast.jobs.optimize.options import OptimizeOptions
    from oneshot_fast.jobs.optimize.run import OptimizeRun
    from oneshot_fast.jobs.prefer.options import PreferOptions
    from oneshot_fast.jobs.prefer.run import PreferRun
    from oneshot_fast.jobs.reinforce.options import ReinforceOptions
    from oneshot_fast.jobs.reinforce.run import ReinforceRun
    from oneshot_fast.jobs.sample.run import SampleRun
    from oneshot_fast.jobs.scale.options import ScaleOptions
    from oneshot_fast.jobs.scale.run import ScaleRun
    from oneshot_fast.jobs.sft.options import SftOptions
    from oneshot_fast.jobs.sft.rewards import RewardRun
    from oneshot_fast.jobs.sft.run import SftRun
    from oneshot_fast.noise.rotation import PatchRotation
    from oneshot_fast.rewards import load_rewards
    from oneshot_fast.rewards.base import Reward, WeightedRewards

__version__ = importlib.metadata.version("oneshot-fast")

# the same names as above: where each is imported from when it is asked for
_LAZY = {
    "AssignOptions": "jobs.assign.options",
    "AssignRun": "jobs.assign.run",
    "DistillOptions": "jobs.distill.options",
    "DistillRun": "jobs.distill.run",
    "EmOptions": "jobs.em.options",
    "EmRun": "jobs.em.targets",
    "EvaluateRun": "jobs.evaluate.run",
    "FewStepGenerator": "generators.few_step",
    "Generator": "generators.base",
    "OneStepGenerator": "generators.loading",
    "OptimizeOptions": "jobs.optimize.options",
    "OptimizeRun": "jobs.optimize.run",
    "PatchRotation": "noise.rotation",
    "PreferOptions": "jobs.prefer.options",
    "PreferRun": "jobs.prefer.run",
    "ReinforceOptions": "jobs.reinforce.options",
    "ReinforceRun": "jobs.reinforce.run",
    "Reward": "rewards.base",
    "RewardEmRun": "jobs.em.rewards",
    "RewardRun": "jobs.sft.rewards",
    "SampleRun": "jobs.sample.run",
    "ScaleOptions": "jobs.scale.options",
    "ScaleRun": "jobs.scale.run",
    "SftOptions": "jobs.sft.options",
    "SftRun": "jobs.sft.run",
    "WeightedRewards": "rewards.base",
    "assign_noise": "jobs.assign.in_memory",
    "frechet_distance": "evaluation.measures",
    "load_rewards": "rewards",
    "open_pairs": "data.sources",
    "optimize_noise": "jobs.optimize.in_memory",
    "read_manifest": "data.manifests",
}
__all__ = ["RotationAdam", "__version__", "build_info", "ops", *_LAZY]


def __getattr__(name: str) -> Any:
    """A name of ``_LAZY``, imported now (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


def build_info() -> dict[str, Any]:
    """Versions that a bug report needs: package, compiler, torch, instruction set, CUDA, Triton.

    ``backends`` has what serves each device and why those before it do not.
    """
    return {
        "oneshot_fast": __version__,
        "compiler": _C.compiler,
        "torch_built_against": _C.torch_version,
        "torch_running": torch.__version__,
        "cpu_isa": _C.isa(),
        "cuda_kernels": _C.cuda_architectures,
        "cuda_available": torch.cuda.is_available(),
        "cuda_version": torch.version.cuda,
        "triton": _installed_version("triton"),
        "backends": _serving(),
    }


def _serving() -> dict[str, str]:
    found = {"cpu": f"cpu ({_C.isa()})"}
    for index in range(torch.cuda.device_count()):
        name, missing = ops.backends(f"cuda:{index}")[0], ops._backends.missing(index)
        before = itertools.takewhile(name.__ne__, missing)
        found[f"cuda:{index}"] = "; ".join((name, *filter(None, map(missing.get, before))))
    return found


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

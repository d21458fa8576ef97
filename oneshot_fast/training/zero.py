"""ZeRO, by DeepSpeed, where accelerate's config asks for it.

Moments and gradients are divided among the processes, with stage 3 the weights, too. DeepSpeed
clips and updates by itself, so here it takes the place of engine and optimiser. A state holds what
a whole model has, as those of the other engines do. (Rajbhandari et al. 2020, arXiv 1910.02054.)
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oneshot_fast.errors import UserError, need_package, one_line, require
from oneshot_fast.generators.base import Generator
from oneshot_fast.runtime.processes import meeting, processes
from oneshot_fast.training.engines import Engine, sharding, sharding_by
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.optimizer import MOMENTS, WeightOptimizer
from oneshot_fast.training.options import TrainOptions

_TESTED = "0.19.8"  # with both stages this one leaves out what is not finite, older ones may not


def make_engine(trainee: Any, loss: Loss) -> Engine:
    """The engine that accelerate's config asks for."""
    return (ZeroEngine if sharding_by() == "DeepSpeed" else Engine)(trainee, loss)


def check_engine(options: TrainOptions, generator: Generator, shards: bool = True) -> None:
    """Raise UserError where accelerate's config asks for what does not work.

    Args:
        options: Of the training.
        generator: That is trained.
        shards: Whether anything but DDP can train it, see ``TrainingRun``.
    """
    engine = sharding_by()
    if engine is None:
        return
    said = f"accelerate's config asks for {engine}"
    require(shards, f"{said}, which is for sft and em; leave it out, for DDP")
    require(options.optimizer == "adamw", f"{said}, which is not for --optimizer adamw8bit")
    if engine == "FSDP":
        sharding()
    else:
        zero_config()
        require(not options.use_ema, f"{said}, which is not for --use_ema; take FSDP2 for it")
    require(not generator.is_compiled, f"{said}, which is not for --compile; leave one out")


def zero_config(max_grad_norm: float = math.inf) -> dict[str, Any]:
    """DeepSpeed's part of accelerate's config, with what is this job's own.

    Raises:
        UserError: If DeepSpeed is not installed, or it asks for what does not work here.
    """
    from accelerate import DeepSpeedPlugin
    from accelerate.utils import compare_versions

    need_package("deepspeed", "accelerate's DeepSpeed config")
    require(
        compare_versions("deepspeed", ">=", _TESTED),
        f"accelerate's DeepSpeed config needs deepspeed >= {_TESTED}: pip install -U deepspeed",
    )
    try:
        config = _chosen(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, ImportError, OSError, AttributeError) as error:
        raise UserError(f"accelerate's DeepSpeed config: {one_line(error)}") from None
    for name, instead in (
        ("optimizer", "AdamW is ours"), ("scheduler", "give --lr_scheduler"),
        ("fp16", "give --dtype"), ("bf16", "give --dtype"),
    ):  # fmt: skip
        asked = config.get(name, {})
        require(
            not asked or (isinstance(asked, dict) and asked.get("enabled") is False),
            f"leave {name} out of DeepSpeed's config: {instead}",
        )
    zero = config.get("zero_optimization", {})
    require(
        zero.get("stage") in (2, 3),
        "of DeepSpeed ZeRO-2 and ZeRO-3 are supported; put zero_stage: 2 or 3 into accelerate's "
        "config, or a stage into zero_optimization of DeepSpeed's",
    )
    require(
        zero.get("compute_grad_norm", True),
        "leave compute_grad_norm out of DeepSpeed's config: bad steps are known by that norm",
    )
    config.pop("train_batch_size", None)
    return config | {
        "train_micro_batch_size_per_gpu": 1,  # unused: the whole batch stays the job's
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm if math.isfinite(max_grad_norm) else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _chosen(config: Any) -> Any:
    """Without what is left to those that use the config."""
    if not isinstance(config, dict):
        return config
    return {k: _chosen(v) for k, v in config.items() if v not in ("auto", None)}


class ZeroEngine(Engine):
    """``Engine`` by DeepSpeed, which takes the weights over in the first step."""

    _optimizer: "ZeroOptimizer"
    _deepspeed: Any = None

    def _prepare(self) -> None:
        """Nothing: a state to resume from may come."""

    def make_optimizer(
        self, parameters: dict[str, nn.Parameter], options: TrainOptions, steps: int, seed: int
    ) -> WeightOptimizer:
        self._optimizer = ZeroOptimizer(parameters, options, steps, seed)
        self._config = zero_config(options.max_grad_norm)
        return self._optimizer

    @contextlib.contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        with meeting():
            if self._deepspeed is None:
                self._deepspeed = self._run = self._optimizer.start(self._losses, self._config)
            self._deepspeed.set_gradient_accumulation_boundary(is_last)
            yield

    def backward(self, loss: Tensor, found: Tensor) -> None:
        # all processes leave a step out where a gradient of one of them is not finite
        factor = torch.where(found.isfinite().all(), self.count, math.nan)
        self._deepspeed.backward(loss * factor)

    def full(self, weight: Tensor) -> Tensor:
        """All of it, in every process's own memory, not the GPU's; all ask together."""
        if not hasattr(weight, "ds_id"):
            return weight
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().to("cpu", copy=True)

    def close(self) -> None:
        super().close()
        if self._deepspeed is not None:
            self._deepspeed.destroy()
            self._deepspeed = None


class ZeroOptimizer(WeightOptimizer):
    """``WeightOptimizer`` whose moments DeepSpeed divides; it clips and updates at once."""

    _deepspeed: Any
    _loaded: dict[str, Tensor] | None = None

    def start(self, losses: nn.Module, config: dict[str, Any]) -> Any:
        """Let DeepSpeed take over, with the moments that were loaded."""
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        made = {"model": losses, "optimizer": self._optimizers[0], "config": config}
        self._deepspeed, *_ = deepspeed.initialize(**made, dist_init_required=False)
        if self._loaded is not None:
            self._take_over(self._deepspeed.optimizer, self._loaded)
            self._loaded = None
        return self._deepspeed

    def _take_over(self, zero: Any, tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        is_third = hasattr(zero, "fp32_partitioned_groups_flat")
        flats = (
            zero.fp32_partitioned_groups_flat if is_third else zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            state = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizers[0].state[flat] = {"step": tensors["updates"][0].float(), **state}
        if not is_third:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                value = tensors[f"{moment}/{name}"].to(parameter.device)
                if is_third:
                    safe_set_local_optimizer_state(parameter, _own_part(value, parameter), moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def clip(self) -> Tensor:
        with meeting():
            self._deepspeed.step()
        return torch.tensor(float(self._deepspeed.get_global_grad_norm()))

    def apply(self) -> None:
        """Nothing: ``clip`` did it, unless a gradient was not finite."""

    def tensors(self) -> dict[str, Tensor]:
        """Those of ``WeightOptimizer``, on the CPU; all processes ask together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [int(state["step"]) for state in self._optimizers[0].state.values()]
        updates = torch.full((len(self.parameters),), max(steps, default=0))
        if not steps:  # all were left out
            return {"updates": updates}
        found = {
            f"{moment}/{name}": safe_get_full_optimizer_state(parameter, moment).cpu()
            for name, parameter in self.parameters.items()
            for moment in MOMENTS
        }
        return found | {"updates": updates}

    def load(self, tensors: dict[str, Tensor]) -> None:
        if tensors["updates"].any():
            names = ("updates", *(f"{m}/{name}" for m in MOMENTS for name in self.parameters))
            self._loaded = {name: tensors[name] for name in names}


def _own_part(value: Tensor, parameter: Any) -> Tensor:
    """What this process has of a value by ZeRO-3, whose equal parts end with padding."""
    size, here = parameter.ds_tensor.numel(), processes()
    padded = nn.functional.pad(value.flatten(), (0, size * here.num_processes - value.numel()))
    return padded.narrow(0, size * here.process_index, size)

"""Several processes on one step, by torch's engines: DDP, or FSDP2 where accelerate's config says.

With DDP every process has the whole model and the gradients are added up as they come. With FSDP2
each has a part of the weights, and so of the moments; a layer's weights are gathered where it is
evaluated. accelerate's own ``prepare`` knows FSDP on GPUs only, so its config is read and torch is
called. DeepSpeed's is in zero.py.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oneshot_fast.errors import UserError, one_line, require
from oneshot_fast.runtime.processes import meeting, processes
from oneshot_fast.runtime.sharded import device_of, whole
from oneshot_fast.training.batch import Batch
from oneshot_fast.training.losses.base import Loss, shared_losses
from oneshot_fast.training.optimizer import WeightOptimizer
from oneshot_fast.training.options import TrainOptions


def sharding_by() -> Literal["FSDP", "DeepSpeed"] | None:
    """What accelerate's config asks for, where there are processes to share weights."""
    for name in ("FSDP", "DeepSpeed"):
        asked = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
        if asked and processes().num_processes > 1:
            return name
    return None


class Engine:
    """Evaluates the losses of a batch in this process, and shares the gradients with the others.

    Attributes:
        module: Whose weights are trained; sharded in place with FSDP2.
        count: Of the processes. Gradients are their mean, so each multiplies its loss by it.
        is_sharded: Whether a process has only a part of weights or moments.
    """

    def __init__(self, trainee: Any, loss: Loss) -> None:
        """Take the module of ``trainee`` as it is, with what is trained unfrozen.

        Raises:
            UserError: If accelerate's config asks for what does not work here.
        """
        self.module: nn.Module = trainee.module
        self.count = processes().num_processes
        self.is_sharded = sharding_by() is not None
        self._plain = _without_weights(self.module) if self.is_sharded else None
        self._losses = _Losses(trainee, loss)
        self._run: nn.Module = self._losses
        if self.is_sharded:
            trainee.replace_module(self.module)  # else it would fail only after the training
        self._prepare()

    def _prepare(self) -> None:
        if self.is_sharded:
            _shard(self.module)
        elif self.count > 1:
            self._run = _replicated(self._losses)

    def make_optimizer(
        self, parameters: dict[str, nn.Parameter], options: TrainOptions, steps: int, seed: int
    ) -> WeightOptimizer:
        """See ``WeightOptimizer``."""
        return WeightOptimizer(parameters, options, steps, seed)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Parts of the loss on this process's rows, each times its share of the whole batch."""
        found: dict[str, Tensor] = self._run(batch)
        return found

    @contextlib.contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        """One of the parts of a step; the gradients are exchanged with the last one."""
        waits = not self.is_sharded and self.count > 1 and not is_last
        run: Any = self._run
        with run.no_sync() if waits else contextlib.nullcontext(), meeting():
            yield

    def backward(self, loss: Tensor, found: Tensor) -> None:
        """Add the gradients of a loss, of which all parts and measures were ``found``."""
        (loss * self.count).backward()

    def full(self, weight: Tensor) -> Tensor:
        """A weight of the module, as ``whole`` takes it."""
        return weight

    def close(self) -> None:
        """Free what the exchange of gradients takes; the module stays as it is."""
        self._run = self._losses

    def whole(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The module in one piece, with these of its weights; of sharded ones a copy of its own.

        All processes ask together.
        """
        if self._plain is None:
            return self.module
        found = {}
        for name, parameter in self.module.named_parameters():
            weight = weights[name] if name in weights else self.full(parameter)
            found[name] = whole(weight.detach()).to(device_of(parameter))
        module = copy.deepcopy(self._plain)
        module.load_state_dict(found, strict=False, assign=True)
        return module.requires_grad_(False)


class _Losses(nn.Module):
    """The losses of a batch as a module: all that a step evaluates is one call of it."""

    def __init__(self, trainee: Any, loss: Loss) -> None:
        super().__init__()
        self.module = trainee.module
        self._of = trainee, loss  # not its submodules
        device = next(trainee.module.parameters()).device
        self.unused = nn.Parameter(torch.zeros(1, device=device))  # or DDP warns that none is

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        trainee, loss = self._of
        return shared_losses(loss, trainee, batch)


def _replicated(module: nn.Module) -> nn.Module:
    """The module in DDP; all processes have the same weights.

    As DDP looks for what is unused, it keeps its buckets: a resumed run adds up in the same order.
    """
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch 2.13: broadcast_buffers
        return DistributedDataParallel(
            module,
            broadcast_buffers=False,
            init_sync=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy whose weights have shapes alone; buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    return copy.deepcopy(module, memo)


def sharding() -> Any:
    """The FSDP plugin of accelerate's config.

    Raises:
        UserError: If it asks for what does not work here.
    """
    from accelerate import FullyShardedDataParallelPlugin

    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate's FSDP config: {one_line(error)}") from None
    require(
        plugin.fsdp_version == 2,
        "FSDP of version 1 is not supported; put fsdp_version: 2 into accelerate's config",
    )
    require(
        not plugin.activation_checkpointing,
        "leave accelerate's fsdp_activation_checkpointing out; give --gradient_checkpointing",
    )
    return plugin


def _shard(module: nn.Module) -> None:
    """Shard the weights of ``module`` in place, as accelerate's config says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = sharding()
    names: Any = plugin.transformer_cls_names_to_wrap or getattr(module, "_no_split_modules", ())
    device = next(module.parameters()).device
    offload: Any = plugin.cpu_offload
    if device.type == "cpu" and isinstance(offload, CPUOffloadPolicy):
        offload = CPUOffloadPolicy(pin_memory=False)  # which is of a GPU's driver
    how = {
        "mesh": init_device_mesh(device.type, (processes().num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": offload,
    }

    def is_unit(child: nn.Module) -> bool:
        if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
            return type(child).__name__ in names
        size = sum(p.numel() for p in child.parameters())
        return plugin.auto_wrap_policy is not None and size > plugin.min_num_params > 0

    for child in [*module.modules()][:0:-1]:  # those inside before those around them
        if is_unit(child):
            fully_shard(child, **how)
    fully_shard(module, **how)

"""AdamW on named weights, all at once or each in the backward pass, with a state to save."""

import functools

import torch
from torch import Tensor, nn

from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.runtime.sharded import shard_like, whole
from oneshot_fast.training.options import TrainOptions

MOMENTS = ("exp_avg", "exp_avg_sq")


class WeightOptimizer:
    """Clips gradients and updates weights; with ``optimizer_in_backward`` each on its own.

    Then a weight's gradient is applied and freed as soon as it is complete, and a weight whose
    gradient is not finite stays as it is.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], options: TrainOptions, steps: int, seed: int = 0
    ) -> None:
        """Make the optimiser of weights by name for ``steps``; UserError if it is not installed."""
        self.parameters, self._options, self._seed = parameters, options, seed
        self._step, self._steps = 0, steps
        everything = list(parameters.values())
        self._squares = torch.zeros((), device=everything[0].device)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        if not options.optimizer_in_backward:
            self._optimizers = [_make_optimizer(everything, options)]
            return
        self._optimizers = [_make_optimizer([parameter], options) for parameter in everything]
        for (name, parameter), one in zip(parameters.items(), self._optimizers, strict=True):
            hook = functools.partial(self._apply_one, name, one)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, from 0, before its update or its backward pass."""
        self._step = step
        lr = self._options.lr_at(step, self._steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def clip(self) -> Tensor:
        """Scale gradients down, if they are still there; returns their norm before, float32."""
        if self._options.optimizer_in_backward:
            return self._squares.sqrt()
        limit = self._options.max_grad_norm
        return whole(nn.utils.clip_grad_norm_(self.parameters.values(), limit)).float()

    def apply(self) -> None:
        """Update the weights, unless that was done in the backward pass."""
        if not self._options.optimizer_in_backward:
            self._update(self._optimizers[0])

    def forget(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self._squares = torch.zeros_like(self._squares)

    def close(self) -> None:
        """Leave the weights alone: no more updates in their backward passes."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _apply_one(
        self, name: str, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
    ) -> None:
        norm = nn.utils.clip_grad_norm_([parameter], self._options.max_grad_norm).float()
        self._squares += norm.square()
        # Waits for the device once per weight: a bad gradient must not reach the moments.
        if torch.isfinite(norm):
            self._update(optimizer, name)
        parameter.grad = None

    def _update(self, optimizer: torch.optim.Optimizer, *place: str) -> None:
        if self._options.optimizer == "adamw":
            optimizer.step()
            return
        # Stochastic rounding draws from the global generator: a seed per step makes it resumable.
        # torchao compiles its step; on the CPU, where memory is no concern, that takes minutes.
        stance = "force_eager" if self._squares.device.type == "cpu" else "default"
        with torch.random.fork_rng(), torch.compiler.set_stance(stance):
            torch.manual_seed(derived_seed(self._seed, "rounding", self._step, *place))
            optimizer.step()

    def move(self, device: torch.device) -> None:
        """Take the moments to a device; updates need them where the weights are."""
        for _, parameter, optimizer in self._each():
            state = optimizer.state.get(parameter, {})
            for moment in state.keys() & set(MOMENTS):
                state[moment] = state[moment].to(device)

    def tensors(self) -> dict[str, Tensor]:
        """Moments by weight, and how often each weight was updated: "updates", [P] int64."""
        tensors: dict[str, Tensor] = {}
        updates = []
        for name, parameter, optimizer in self._each():
            state = optimizer.state.get(parameter, {})
            updates.append(int(state.get("step", 0)))
            for moment in state.keys() & set(MOMENTS):
                tensors |= {f"{moment}{k}/{name}": v for k, v in _stored(state[moment]).items()}
        return tensors | {"updates": torch.tensor(updates)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` gave."""
        for (name, parameter, optimizer), count in zip(
            self._each(), tensors["updates"].tolist(), strict=True
        ):
            if not count:
                continue
            state: dict[str, Tensor] = {"step": torch.tensor(float(count))}
            for moment in MOMENTS:
                if self._options.optimizer == "adamw":
                    state[moment] = torch.zeros_like(parameter)
                else:  # torchao decides by size which moments have 8 bits
                    signed = moment == "exp_avg"
                    state[moment] = optimizer._new_buffer(parameter, signed)  # type: ignore
                for key, value in _stored(state[moment]).items():
                    value.copy_(shard_like(tensors[f"{moment}{key}/{name}"], value))
            optimizer.state[parameter] = state

    def _each(self) -> list[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        several = len(self._optimizers) > 1
        return [
            (name, parameter, self._optimizers[k if several else 0])
            for k, (name, parameter) in enumerate(self.parameters.items())
        ]


def _make_optimizer(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    from torchao.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]

    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters,
        lr=options.lr,
        weight_decay=options.weight_decay,
        bf16_stochastic_round=parameters[0].dtype == torch.bfloat16,
    )
    return optimizer


def _stored(moment: Tensor) -> dict[str, Tensor]:
    """What a moment consists of: itself, or the codes and scales of 8-bit blocks."""
    parts = {f".{key}": getattr(moment, key, None) for key in ("codes", "scale")}
    return {key: v for key, v in parts.items() if v is not None} or {"": moment}

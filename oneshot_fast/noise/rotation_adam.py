"""RotationAdam: Adam on rotation matrices themselves, with steps in radians."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops.rotation_step import rotation_step

_MOMENTS = ("elementwise", "scalar")


class RotationAdam(torch.optim.Optimizer):
    """Riemannian Adam over orthogonal matrices; see ``ops.rotation_step`` for the formulas.

    The parameters are the rotations q, [..., D, D], float32 or float64, orthogonal at the start
    and ever after. They need no exponential map around them::

        q = torch.eye(D).repeat(B, 1, 1)
        optimizer = RotationAdam([q], lr=0.1)
        z = ops.patch_rotate(eps, q, p).requires_grad_()
        (dz,) = torch.autograd.grad(loss(z), z)
        optimizer.step(outer={q: ops.patch_outer(dz, z.detach(), p, like=q)})

    This is the cheap way: autograd ends at z, and ``patch_outer(dz, z)`` is dq q^T. The common way,
    q.requires_grad_(), backward() and step(), gives the same for the price of dq and a product.

    Sources: Becigneul and Ganea, "Riemannian adaptive optimization methods", 2019 (arXiv
    1810.00760); Lezcano-Casado, "Trivializations for gradient-based optimization on manifolds",
    2019 (arXiv 1909.09501).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_angle: float = math.pi / 4,
        second_moment: str = "elementwise",
    ) -> None:
        """Make the optimiser; every option may differ between parameter groups.

        Args:
            params: Rotations, or parameter groups of them.
            lr: Step size in radians per element of the generator of a step.
            betas: Decays of the first and the second moment.
            eps: Added to the root of the second moment; above 0.
            max_angle: Trust radius: no step turns any vector by more, in radians.
            second_moment: "elementwise", or "scalar" for one per matrix.

        Raises:
            ValueError: An option is out of its range, or a parameter is not [..., D, D].
        """
        options = {"lr": lr, "betas": betas, "eps": eps, "max_angle": max_angle}
        super().__init__(params, {**options, "second_moment": second_moment})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        outer: Mapping[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """Move every rotation that has a gradient.

        Args:
            closure: Computes the loss and the gradients anew.
            outer: Gradients dq q^T by rotation, each [..., D, D] like it, for example
                ``patch_outer(dz, z, p, like=q)``; they come before a ``.grad``. Float16 and
                bfloat16 are welcome for float32 rotations.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: ``outer`` names a tensor that is no parameter of this optimiser.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        left = dict(outer or {})
        for group in self.param_groups:
            for q in group["params"]:
                g = left.pop(q, None)
                if g is None and q.grad is not None:
                    g = q.grad @ q.mT
                if g is not None:
                    self._move(q, g, group)
        if left:
            shapes = ", ".join(str(list(q.shape)) for q in left)
            raise ValueError(f"RotationAdam: no parameters of this optimiser: {shapes}")
        return loss

    def _move(self, q: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[q]
        if not state:
            scalar = group["second_moment"] == "scalar"
            state["exp_avg"] = torch.zeros_like(q, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = q.new_zeros(q.shape[:-2] if scalar else q.shape)
            state["steps"] = q.new_zeros(q.shape[:-2])
        beta1, beta2 = group["betas"]
        rotation_step(
            q,
            g,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["steps"],
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            max_angle=group["max_angle"],
        )

    def save(self, path: Path | str) -> None:
        """Write state and options as safetensors, atomically; the rotations are not in it."""
        from oneshot_fast.runtime.files import write_safetensors

        saved = self.state_dict()
        tensors = {
            f"{index}.{name}": tensor
            for index, state in saved["state"].items()
            for name, tensor in state.items()
        }
        write_safetensors(Path(path), tensors, {"param_groups": saved["param_groups"]})

    def load(self, path: Path | str) -> None:
        """Read what ``save`` wrote into an optimiser of the same parameters.

        Raises:
            ValueError: The groups or the number of their parameters differ.
        """
        from safetensors.torch import load_file

        from oneshot_fast.runtime.files import read_metadata

        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(path).items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = read_metadata(Path(path), "param_groups")
        self.load_state_dict({"state": state, "param_groups": groups})


def _check(group: dict[str, Any]) -> None:
    """Raise ValueError unless the options and the shapes of a group are right."""
    for q in group["params"]:
        square = q.dim() >= 2 and q.shape[-1] == q.shape[-2]
        if not square or q.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "RotationAdam: expected [..., D, D] in float32 or float64, got "
                f"{list(q.shape)} in {str(q.dtype).removeprefix('torch.')}"
            )
    for name, value, right in (
        ("lr", group["lr"], group["lr"] >= 0),
        ("betas", group["betas"], all(0 <= beta < 1 for beta in group["betas"])),
        ("eps", group["eps"], group["eps"] > 0),
        ("max_angle", group["max_angle"], group["max_angle"] > 0),
        ("second_moment", group["second_moment"], group["second_moment"] in _MOMENTS),
    ):
        if not right:
            raise ValueError(f"RotationAdam: {name} = {value!r} is out of range")

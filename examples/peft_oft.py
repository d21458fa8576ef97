"""peft's orthogonal fine-tuning (OFT) with our ops for its blocks, beside its own.

peft turns each block's skew matrix Q into the rotation (I - Q)(I + Q)^-1. `ops.cayley` gives the
same matrix; `ops.skew_exp` gives exp(-2 Q), the same to third order, which reaches every rotation.

    pip install peft
    python examples/peft_oft.py
"""

import copy
import statistics
import time
import types

import torch
from peft import OFTConfig, get_peft_model
from peft.tuners.oft.layer import OFTRotationModule
from torch import nn

from oneshot_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_op(model, op, factor):
    """Let every OFT block of a peft model make its rotation by ``op(factor * Q)``."""

    def rotation(self, weight, block_size, use_cayley_neumann=True, num_neumann_terms=5):
        upper = weight.new_zeros(len(weight), block_size, block_size)
        upper[:, self.rows, self.cols] = weight
        return op(factor * upper)

    for module in model.modules():
        if isinstance(module, OFTRotationModule):
            module._cayley_batch = types.MethodType(rotation, module)
    return model


def step(model, x, y):
    """One training step's gradients; returns the loss."""
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return loss.item()


def main(width=512, block_size=32, rounds=30, seed=0):
    """Compare the three; return their losses and median milliseconds per step by name."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4))).to(DEVICE)
    config = OFTConfig(
        oft_block_size=block_size, target_modules=r"\d", bias="none", use_cayley_neumann=False
    )
    peft_model = get_peft_model(net, config)
    for weight in peft_model.parameters():
        if weight.requires_grad:  # peft starts at the identity, where all agree
            nn.init.normal_(weight, std=0.02)
    # op(a) acts on a - a^T; cayley halves it
    models = {
        "peft": peft_model,
        "cayley": use_op(copy.deepcopy(peft_model), ops.cayley, -2),
        "skew_exp": use_op(copy.deepcopy(peft_model), ops.skew_exp, -2),
    }
    x, y = torch.randn(2, 64, width, device=DEVICE)
    losses = {name: step(model, x, y) for name, model in models.items()}
    times = {name: [] for name in models}
    for _ in range(rounds):  # in turn, so that other load hits all alike
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x, y)
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name in models:
        print(f"{name:10} loss {losses[name]:.6f}   {medians[name]:7.2f} ms per step")
    return losses, medians


if __name__ == "__main__":
    main()

"""A linear layer whose weight stays orthogonal: skew_exp with torch.nn.utils.parametrize.

python examples/parametrize.py
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

from oneshot_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class SkewExp(nn.Module):
    """Any square matrix a to the orthogonal exp(a - a^T)."""

    def forward(self, a):
        return ops.skew_exp(a)


def main(steps=300, seed=0):
    """Recover a hidden rotation from noisy pairs; return the errors and the final defect."""
    torch.manual_seed(seed)
    D = 32
    hidden = torch.linalg.qr(torch.randn(D, D)).Q
    hidden[:, 0] *= torch.linalg.det(hidden)  # a rotation: determinant 1
    x = torch.randn(512, D)
    y = (x @ hidden.T + 0.01 * torch.randn(512, D)).to(DEVICE)
    x, hidden = x.to(DEVICE), hidden.to(DEVICE)

    layer = nn.Linear(D, D, bias=False).to(DEVICE)
    nn.init.zeros_(layer.weight)  # the identity
    parametrize.register_parametrization(layer, "weight", SkewExp())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    errors = []
    for step in range(steps):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((layer.weight - hidden).norm().item())
        if step % 50 == 0:
            print(
                f"step {step:3}: loss {loss.item():.5f}, distance to the rotation {errors[-1]:.4f}"
            )
    q = layer.weight
    defect = (q.T @ q - torch.eye(D, device=DEVICE)).norm().item()
    print(f"||q^T q - I|| = {defect:.1e} after {steps} steps")
    return errors, defect


if __name__ == "__main__":
    main()

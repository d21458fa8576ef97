"""The fused losses in a plain training loop of a one-step generator.

`latent_mse` takes the network's prediction and does the Euler step x0 = x - sigma eps_hat itself;
`pixel_l1` takes the decoder's raw output and clamps it. Neither writes what lies between to memory,
and both give one loss per image, so that images can be weighted.

    python examples/fused_losses.py
"""

import torch
from torch import nn

from oneshot_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIGMA = 14.6  # noise level of SDXL-Turbo's single step


def main(steps=200, seed=0):
    """Train a small convolutional generator on 32 pairs; return the losses of all steps."""
    torch.manual_seed(seed)
    unet = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 4, 3, padding=1))
    decoder = nn.ConvTranspose2d(4, 3, 8, stride=8).requires_grad_(False)
    unet, decoder = unet.to(DEVICE), decoder.to(DEVICE)
    noise = torch.randn(32, 4, 8, 8, device=DEVICE)
    latents = torch.randn(32, 4, 8, 8, device=DEVICE)
    images = (decoder(latents) / 2 + 0.5).clamp(0, 1)
    weights = torch.rand(32, device=DEVICE)

    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        x = SIGMA * noise
        eps_hat = unet(noise)
        latent = ops.latent_mse(eps_hat, x, latents, SIGMA)  # [32]
        pixel = ops.pixel_l1(decoder(x - SIGMA * eps_hat), images)  # [32]
        loss = (weights * (latent + pixel)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:3}: latent {latent.mean():.4f}, pixel {pixel.mean():.4f}")
    print(f"weighted loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()

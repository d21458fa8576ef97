"""Optimise the noise of a plain diffusers pipeline by rotating its patches.

The generator stays as it is, and so does the law of the noise: every 2 x 2 patch is turned by one
orthogonal matrix, learned by Adam. The loop asks the pipeline's own modules for what `pipe(...)`
would make of the noise; at the end the noise goes into the pipeline as `latents`.

    python examples/noise_rotation.py [folder or hub id of a one-step SDXL pipeline]
"""

import sys

import torch
from diffusers import StableDiffusionXLPipeline

from oneshot_fast import ops
from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.noise.rotation import PatchRotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def one_step(pipe, noise, embeds, pooled):
    """What the pipeline's single step makes of N(0, 1) noise [1, C, h, w]: RGB before clamping."""
    scheduler, (h, w) = pipe.scheduler, noise.shape[-2:]
    scheduler.set_timesteps(1, device=noise.device)
    t, sigma = scheduler.timesteps[0], scheduler.sigmas[0]
    size = (h * pipe.vae_scale_factor, w * pipe.vae_scale_factor)
    time_ids = torch.tensor([[*size, 0, 0, *size]], device=noise.device, dtype=embeds.dtype)
    x = noise * scheduler.init_noise_sigma
    eps_hat = pipe.unet(
        x / (sigma**2 + 1) ** 0.5,
        t,
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    return pipe.vae.decode((x - sigma * eps_hat) / pipe.vae.config.scaling_factor).sample


def main(model=None, steps=40, seed=0):
    """Bring one noise close to an image that another noise makes; return the losses and the gap."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model or model_path()).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(False)
    prompt = "a photo of the digit seven"
    call = {"prompt": prompt, "num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt"}
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)

    generator = torch.Generator().manual_seed(seed)
    side, channels = pipe.default_sample_size, pipe.unet.config.in_channels
    other, eps = torch.randn(2, 1, channels, side, side, generator=generator).to(DEVICE)
    target = pipe(latents=other, **call).images.float()

    rotation = PatchRotation(eps.shape, patch_size=2, device=DEVICE)  # starts at the identity
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.02)
    losses = []
    for step in range(steps):
        loss = ops.pixel_l1(one_step(pipe, rotation(eps), embeds, pooled), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3}: mean absolute error {losses[-1]:.4f}")

    noise = rotation(eps).detach()
    image = pipe(latents=noise, **call).images.float()  # an ordinary call of the pipeline
    error = (image - target).abs().mean().item()
    print(f"the pipeline's own image: {error:.4f}, from {losses[0]:.4f}")
    print(
        f"energy of the noise: {eps.square().mean():.6f} before, {noise.square().mean():.6f} after"
    )
    return losses, error


if __name__ == "__main__":
    main(*sys.argv[1:])

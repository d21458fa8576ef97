"""The diffusion teacher of the recipe and its one-step student."""

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm import trange

from oneshot_fast.embedded.digits import IMAGE_SIZE
from oneshot_fast.embedded.pipeline import LATENT_SIZE
from oneshot_fast.recipes.tiny.autoencoder import base_latents
from oneshot_fast.recipes.tiny.config import TrainConfig
from oneshot_fast.recipes.tiny.fitting import fit, start_near_linear
from oneshot_fast.recipes.tiny.material import Material


def encode(pipeline: StableDiffusionXLPipeline, material: Material) -> tuple[Tensor, Tensor]:
    """Token [K, 77, 64] and pooled embeddings [K, 32] of all K prompts, with gradients."""
    context, _, pooled, _ = pipeline.encode_prompt(
        list(material.prompts),
        device=torch.device("cpu"),
        do_classifier_free_guidance=False,
    )
    return context, pooled


def predict_noise(
    unet: UNet2DConditionModel, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """The UNet's noise prediction, [B, 4, 8, 8], with the size conditions of a 64 x 64 image.

    The noisy latents ``x`` [B, 4, 8, 8] have unit variance, timesteps ``t`` [B] go from 0 to 999,
    and token and pooled embeddings are [B, 77, 64] and [B, 32].
    """
    # Original size, crop and target size, as the pipeline passes them.
    time_ids = x.new_tensor([IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE])
    conditions = {"text_embeds": pooled, "time_ids": time_ids.expand(len(x), 6)}
    return unet(x, t, context, added_cond_kwargs=conditions).sample


def train_teacher(
    config: TrainConfig, pipeline: StableDiffusionXLPipeline, material: Material
) -> None:
    """Train UNet and text encoders to predict the noise (epsilon) at uniform timesteps, by MSE.

    Modules without gradients are kept as they are.
    """
    draw = torch.Generator().manual_seed(config.seed + 1)
    parts = material.base(config.latent_copies, config.seed + 1)
    latents, labels = base_latents(pipeline.vae, parts)
    alphas = pipeline.scheduler.alphas_cumprod
    batch = config.batch_size

    def loss_of_step(_: int) -> Tensor:
        index = torch.randint(len(latents), (batch,), generator=draw)
        # Stratified: every step sees all noise levels, which lowers the gradient's variance.
        t = (torch.arange(batch) + torch.rand(batch, generator=draw)) * (1000 / batch)
        t = t.long().clamp(max=999)
        eps = torch.randn(batch, *latents.shape[1:], generator=draw)
        alpha = alphas[t].view(-1, 1, 1, 1)
        x = alpha.sqrt() * latents[index] + (1 - alpha).sqrt() * eps
        context, pooled = encode(pipeline, material)
        keep = (torch.rand(batch, generator=draw) >= config.prompt_dropout).float()
        context = context[labels[index]] * keep.view(-1, 1, 1)
        pooled = pooled[labels[index]] * keep.view(-1, 1)
        return F.mse_loss(predict_noise(pipeline.unet, x, t, context, pooled), eps)

    start_near_linear(pipeline.unet)
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    fit("teacher", parameters, loss_of_step, config.teacher_steps, lr=8e-4, ema_decay=0.998)


@torch.no_grad()
def sample_teacher(
    pipeline: StableDiffusionXLPipeline,
    material: Material,
    eps: Tensor,
    labels: Tensor,
    steps: int,
    guidance: float,
) -> Tensor:
    """End points of the teacher's probability-flow ODE by DPM-Solver++(2M), arXiv:2211.01095.

    From base noise ``eps`` [B, 4, 8, 8] for the classes ``labels`` [B] to scaled latents [B, 4, 8,
    8]. Classifier-free ``guidance`` of 1 takes the prompted prediction as it is.
    """
    solver = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=True, algorithm_type="dpmsolver++"
    )
    solver.set_timesteps(steps)
    context, pooled = (embedding[labels] for embedding in encode(pipeline, material))
    x = eps * solver.init_noise_sigma
    for t in solver.timesteps:
        scaled, time = solver.scale_model_input(x, t), t.expand(len(x))
        noise = predict_noise(pipeline.unet, scaled, time, context, pooled)
        if guidance != 1:
            nothing = torch.zeros_like(context), torch.zeros_like(pooled)
            plain = predict_noise(pipeline.unet, scaled, time, *nothing)
            noise = plain + guidance * (noise - plain)
        x = solver.step(noise, t, x).prev_sample
    return x


def make_pairs(
    config: TrainConfig, pipeline: StableDiffusionXLPipeline, material: Material
) -> dict[str, Tensor]:
    """Noises eps and end points x0 (scaled latents), [M, 4, 8, 8], with labels [M]."""
    draw = torch.Generator().manual_seed(config.seed + 2)
    count = config.distill_pairs
    eps = torch.randn(count, 4, LATENT_SIZE, LATENT_SIZE, generator=draw)
    labels = torch.arange(count) % len(material.prompts)
    parts = []
    for first in trange(0, count, 256, desc="pairs"):
        part = slice(first, first + 256)
        arguments = eps[part], labels[part], config.solver_steps, config.guidance
        parts.append(sample_teacher(pipeline, material, *arguments))
    return {"eps": eps, "x0": torch.cat(parts), "labels": labels}


def train_student(
    config: TrainConfig,
    pipeline: StableDiffusionXLPipeline,
    material: Material,
    pairs: dict[str, Tensor],
) -> None:
    """Train the UNet to reach the teacher's end point in the pipeline's single Euler step.

    Loss: pseudo-Huber distance of whole latents, sqrt(|d|^2 + c^2) - c (arXiv:2310.14189), which
    lets the few noises between two modes weigh less than MSE would.
    """
    draw = torch.Generator().manual_seed(config.seed + 2)
    pipeline.scheduler.set_timesteps(1)
    sigma, t = pipeline.scheduler.sigmas[0], pipeline.scheduler.timesteps[0]
    with torch.no_grad():
        context, pooled = encode(pipeline, material)
    c = 0.1 * pairs["x0"][0].numel() ** 0.5
    batch = config.batch_size

    def loss_of_step(_: int) -> Tensor:
        index = torch.randint(len(pairs["eps"]), (batch,), generator=draw)
        x, labels = sigma * pairs["eps"][index], pairs["labels"][index]
        scaled = x / (sigma**2 + 1) ** 0.5
        eps_hat = predict_noise(
            pipeline.unet, scaled, t.expand(batch), context[labels], pooled[labels]
        )
        squared = (x - sigma * eps_hat - pairs["x0"][index]).square().sum((1, 2, 3))
        return ((squared + c**2).sqrt() - c).mean()

    parameters = pipeline.unet.parameters()
    fit("distill", parameters, loss_of_step, config.distill_steps, lr=8e-4, ema_decay=0.998)

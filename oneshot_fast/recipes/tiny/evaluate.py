"""How good the embedded generator is: what `python -m oneshot_fast.tiny evaluate` prints."""

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor
from tqdm import trange

from oneshot_fast.embedded.classifier import DigitClassifier
from oneshot_fast.embedded.digits import BASE_STYLE, TARGET_STYLE, load_digits, prompt_of, render
from oneshot_fast.evaluation.measures import frechet_distance, pairwise_diversity, prompt_accuracy


def sample_digits(
    pipeline: StableDiffusionXLPipeline,
    labels: Tensor,
    seed: int,
    steps: int = 1,
    guidance: float = 1.0,
) -> Tensor:
    """Images [N, 3, 64, 64] in [0, 1] of digits ``labels`` [N] by the pipeline itself.

    It takes so many ``steps``, with classifier-free ``guidance``; 1 is none.
    """
    draw = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for first in trange(0, len(labels), 50, desc="sample"):
        images = pipeline(
            [prompt_of(digit) for digit in labels[first : first + 50].tolist()],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=draw,
            output_type="pt",
        ).images
        parts.append(images.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """PSNR in dB of the VAE's reconstruction (posterior mean) of images in [0, 1] RGB."""
    parts = images.split(50)
    outputs = [vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample for part in parts]
    error = ((torch.cat(outputs) / 2 + 0.5).clamp(0, 1) - images).square().mean()
    return (-10 * error.log10()).item()


@torch.no_grad()
def measure(
    pipeline: StableDiffusionXLPipeline,
    classifier: DigitClassifier,
    per_digit: int,
    seed: int,
    steps: int = 1,
    guidance: float = 1.0,
) -> tuple[dict[str, float], Tensor]:
    """Accuracy, diversity and Frechet distances of samples beside those of real digits.

    Returns:
        The measures by name, and the samples [10 per_digit, 3, 64, 64] (digits 0 to 9 in turn).
    """
    labels = torch.arange(10).repeat(per_digit)
    samples = sample_digits(pipeline, labels, seed, steps, guidance)
    digits, real_labels = load_digits("heldout")
    base, target = render(digits, BASE_STYLE), render(digits, TARGET_STYLE)
    features = classifier.features(samples)
    real_diversity = pairwise_diversity(base, real_labels)
    diversity = pairwise_diversity(samples, labels)
    return {
        "samples": len(samples),
        "prompt_accuracy": prompt_accuracy(classifier(samples), labels),
        "diversity": diversity,
        "diversity_real": real_diversity,
        "diversity_ratio": diversity / real_diversity,
        "frechet_to_base_style": frechet_distance(features, classifier.features(base)),
        "frechet_to_target_style": frechet_distance(features, classifier.features(target)),
        "classifier_accuracy_base_style": prompt_accuracy(classifier(base), real_labels),
        "classifier_accuracy_target_style": prompt_accuracy(classifier(target), real_labels),
        "vae_psnr_base_style_db": reconstruction_psnr(pipeline.vae, base),
        "vae_psnr_target_style_db": reconstruction_psnr(pipeline.vae, target),
    }, samples

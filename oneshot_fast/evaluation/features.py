"""What images are compared by: features of published networks, of the user's, or of the VAE."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.data.images import squared
from oneshot_fast.errors import UserError, require
from oneshot_fast.evaluation.distances import CMMD_SIGMA
from oneshot_fast.generators.base import Classifier, Conditioning, Generator
from oneshot_fast.rewards.base import Setup
from oneshot_fast.rewards.clip_encoder import VIT_L, load_clip
from oneshot_fast.rewards.preprocess import resize
from oneshot_fast.rewards.weights import read_model
from oneshot_fast.runtime.user_functions import import_function

DINO = "DINOv2-L-14"
_HUB = {VIT_L: "openai/clip-vit-large-patch14", DINO: "facebook/dinov2-large"}
_DINO_SIDE = 224  # pixels, as Stein et al. 2023 (arXiv:2306.04675) measured with
# of ImageNet's pixels, as DINOv2 was trained with (Oquab et al. 2023, arXiv:2304.07193)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CELLS = 4  # pooled latents: cells a side
_AT_ONCE = 16  # prompts: encodings of all are large

FEATURES_HELP = "clip, dinov2 (each also with :FOLDER), vae, or python:module.function"


@dataclass(frozen=True)
class Features:
    """A way to compare images.

    Attributes:
        name: How outputs call it.
        of: Features [B, F] float32 of images [B, 3, H, W] in [0, 1] RGB.
        fit: How well images with these features, [B, F], fit their B prompts, [B]; or None.
        told: Embeddings [B, E] of B prompts, which a ``PromptProbe`` learns to tell from features
            that know nothing of prompts; or None.
        sigma: Width of the MMD's kernel; None: the median distance of real images.
        is_weak: Whether it knows little of what people see, and has to be named with that.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    fit: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    told: Callable[[Sequence[str]], Tensor] | None = None
    sigma: float | None = None
    is_weak: bool = False


def load_features(
    spec: str | None,
    generator: Generator,
    classifier: Classifier | None = None,
    setup: Setup | None = None,
) -> Features:
    """The features called ``spec``.

    Args:
        spec: "clip", "dinov2", each also with ":FOLDER", "vae" or python:module.function; None
            takes the classifier, CLIP, DINOv2 if they are on this machine, or else the VAE.
        generator: Its VAE serves where nothing else does; it must not be trained.
        classifier: That knows all prompts.
        setup: Where models are and compute; by default ./models, on the generator's device.

    Raises:
        UserError: If there are no such features, or a model is missing or damaged.
    """
    setup = setup or Setup(Path("models"), generator.device, torch.float32)
    if spec is None:
        if classifier is not None:
            return of_classifier(classifier)
        there = (kind for kind, model in _MODELS.items() if _folder(setup, model))
        spec = next(there, "vae")
    if spec == "vae":
        return _of_vae(generator)
    if spec.startswith("python:"):
        feature_function(spec)
        return Features(spec, _on(generator.device, lambda images: features_of(images, spec)))
    kind, _, given = spec.partition(":")
    if kind not in _MODELS:
        raise UserError(f"no features {spec!r}; there are {FEATURES_HELP}")
    model = _MODELS[kind]
    folder = Path(given) if given else _folder(setup, model) or setup.models_dir / model
    place = Setup(folder.parent, setup.device, setup.dtype)
    return (_of_clip if kind == "clip" else _of_dino)(place, folder.name)


_MODELS = {"clip": VIT_L, "dinov2": DINO}


def _folder(setup: Setup, model: str) -> Path | None:
    """Where a published model lies: in the models' folder, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "model.safetensors", *(("merges.txt",) if model == VIT_L else ()))
    if all((setup.models_dir / model / name).is_file() for name in names):
        return setup.models_dir / model
    found = [try_to_load_from_cache(_HUB[model], name) for name in names]
    cached = [Path(path) for path in found if isinstance(path, str)]
    return cached[0].parent if len(cached) == len(names) else None


def of_classifier(classifier: Classifier) -> Features:
    """Of a generator's own classifier, at 64 x 64 pixels at most."""
    return Features(
        "the classifier of these prompts",
        lambda images: classifier.features(squared(images, 64).cpu()),
    )


def _of_clip(setup: Setup, model: str) -> Features:
    encoder = load_clip(setup, model)

    def fit(features: Tensor, prompts: Sequence[str]) -> Tensor:
        return (features * encoder.encode_prompts(prompts)).sum(1)

    of = _on(setup.device, encoder.encode_images)
    return Features(_named("CLIP ViT-L/14", setup, model), of, fit, sigma=CMMD_SIGMA)


def _of_dino(setup: Setup, model: str) -> Features:
    """The class token after the last norm, of images whose shorter side is 224 pixels."""
    network = read_model(setup, model, "Dinov2Model")

    def of(images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (_MEAN, _STD))
        pixels = (resize(images.float(), _DINO_SIDE) - mean) / std
        return network(pixels.to(network.dtype)).pooler_output.float()

    return Features(_named("DINOv2 ViT-L/14", setup, model), _on(setup.device, of))


def _named(name: str, setup: Setup, model: str) -> str:
    known = model in _HUB or "models--" in str(setup.models_dir)
    return name if known else f"{name.split()[0]} in {setup.models_dir / model}"


def _on(device: torch.device, of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: of(images.to(device))


def _of_vae(generator: Generator) -> Features:
    """Means and deviations of latents in 4 x 4 cells, [B, 2 C 16]: layout, colour, roughness."""

    def of(images: Tensor) -> Tensor:
        latents = torch.stack([generator.encode_image(image) for image in images])
        side = min(_CELLS, *latents.shape[-2:])
        mean = F.adaptive_avg_pool2d(latents, side)
        square = F.adaptive_avg_pool2d(latents.square(), side)
        spread = (square - mean.square()).clamp_min(0).sqrt()
        return torch.cat((mean, spread), 1).flatten(1)

    def told(prompts: Sequence[str]) -> Tensor:
        parts = [prompts[k : k + _AT_ONCE] for k in range(0, len(prompts), _AT_ONCE)]
        return torch.cat([_pooled(generator.encode_prompts(p)).float().cpu() for p in parts])

    name = "the generator's own VAE latents, pooled, and the prompts that they tell (a weak judge)"
    return Features(name, of, told=told, is_weak=True)


def _pooled(told: Conditioning) -> Tensor:
    """An embedding per prompt, [B, E]: its own, or the mean of its tokens that are no padding."""
    if told.pooled is not None:
        return told.pooled
    if told.mask is None:
        return told.embeds.mean(1)
    weights = told.mask.to(told.embeds.dtype)[..., None]
    return (told.embeds * weights).sum(1) / weights.sum(1).clamp_min(1)


@functools.cache
def feature_function(name: str) -> Callable[[Tensor], Any]:
    """The function that ``name``, python:module.function, names; UserError if there is none."""
    return import_function(name, "features")


def features_of(images: Tensor, name: str) -> Tensor:
    """Features [B, F] float32 that a function gives to images [B, 3, H, W] float32 in [0, 1] RGB.

    ``name`` is python:module.function; it returns a floating tensor [B, ...], differentiable.

    Raises:
        UserError: If it returns something else.
    """
    found = feature_function(name)(images)
    require(
        torch.is_tensor(found) and found.is_floating_point(),
        f"features {name} must be a floating tensor, not {_kind(found)}",
    )
    require(
        found.ndim > 0 and len(found) == len(images) and found.numel() >= len(images),
        f"features {name} have shape {list(found.shape)}, expected [{len(images)}, ...], a row for "
        "each image",
    )
    return found.float().flatten(1) if found.ndim > 1 else found.float()[:, None]


def _kind(value: object) -> str:
    return f"one of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

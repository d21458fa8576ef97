"""What a generator is: prompts and Gaussian noise in, latents and images out."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from oneshot_fast.data.images import to_pil
from oneshot_fast.data.prompts import warn_of_cut
from oneshot_fast.data.sizes import Frame, Size, size_fields
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.layouts import Layout
from oneshot_fast.generators.lora_files import Adapter, LoraFile
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.runtime.sharded import device_of

Recomputed = Literal["none", "rewards", "full"]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about B prompts; every tensor has a row per prompt.

    Attributes:
        embeds: Hidden states of the text encoders, [B, T, E].
        pooled: Pooled embeddings, [B, P]; None for a model without.
        mask: 1 for each token of the prompt, 0 for padding, [B, T]; None if all count.
        seeds: Of what a sampler of several steps draws after the first noise, [B] int64; None for
            one that draws nothing.
        frames: Height and width of the original pictures, and rows and columns cut off above and to
            the left, [B, 4] int64; None: nothing was cut.
        guidance: What a model that embeds its guidance is told, [B]; None: the generator's.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    seeds: Tensor | None = None
    frames: Tensor | None = None
    guidance: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, [B, ...]; ``dataclasses.replace`` puts others in their place."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def select(self, rows: slice | Sequence[int] | Tensor) -> "Conditioning":
        """That of the prompts at ``rows``, in their order."""
        return replace(self, **{name: value[rows] for name, value in self.tensors().items()})

    def to(self, device: str | torch.device) -> "Conditioning":
        """The same on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """One batch of the prompts of all ``parts``, of which there is at least one."""
        rows = [part.tensors() for part in parts]
        return replace(parts[0], **{name: torch.cat([r[name] for r in rows]) for name in rows[0]})


@dataclass(frozen=True)
class Prediction:
    """One evaluation of the denoiser and the clean latents that it stands for.

    ``ops.latent_mse(output, x, target, sigma)`` compares them without forming them.

    Attributes:
        output: Of the denoiser, [B, C, h, w] float32.
        x: What the step starts from, the same shape.
        sigma: Factor of the output.
    """

    output: Tensor
    x: Tensor
    sigma: float

    @property
    def latents(self) -> Tensor:
        """Estimate of the clean latents, x - sigma * output, [B, C, h, w] float32."""
        return self.x - self.sigma * self.output

    def select(self, rows: slice) -> "Prediction":
        """That of ``rows``."""
        return Prediction(self.output[rows], self.x[rows], self.sigma)


@dataclass(frozen=True)
class LoadOptions:
    """How a generator is loaded."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None  # computes in it; by default bfloat16 on cuda, else float32
    master_weights: bool = False  # keep the weights in float32, for training
    variant: str | None = None  # of the weights, such as "fp16"; plain ones serve where it lacks
    revision: str | None = None  # of the hub
    model_config: str | None = None  # for a single file: folder or hub id with the configs
    local_files_only: bool = False  # never ask the hub
    timestep: float | None = None  # where the one step begins, if not at the noisiest timestep
    lora: tuple[LoraFile, ...] = ()  # merged into the weights
    several_steps: bool = False  # the single one, which many-step models lack, is not read


def unit_rgb(raw: Tensor) -> Tensor:
    """Images in [0, 1] RGB of decoded ones in about [-1, 1], both [B, 3, H, W]."""
    return (raw / 2 + 0.5).clamp(0, 1)


class Classifier(Protocol):
    """Judge of images in [0, 1] RGB."""

    def features(self, images: Tensor) -> Tensor:
        """Features [B, F], in which distances are measured, of images [B, 3, H, W]."""

    def label_of(self, prompt: str) -> int | None:
        """The class that ``prompt`` names, None if none."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the classes, [B, K]."""


class Generator(ABC):
    """Prompts and Gaussian noise in, latents and images out.

    Weights are frozen; training unfreezes ``denoiser``. Noise, latents and images are float32.
    """

    runs_in_half: bool = True  # bfloat16 on a GPU, unless another type is asked for
    classifier: Classifier | None = None  # a judge of samples that comes with the model
    autocast: torch.dtype | None = None  # of the arithmetic, over float32 weights
    is_compiled: bool = False  # then each batch size costs a compilation
    prompt_tokens: int = 77  # that the model reads, both ends included
    num_inference_steps: int = 1
    backprop_steps: int = 1  # evaluations of the denoiser that are differentiated
    takes_lora: bool = False  # whether ``load`` merges those that it is given
    lora: tuple[LoraFile, ...] = ()  # merged when it was loaded, or stacked
    _told: frozenset[str] = frozenset()  # prompts that were warned of

    @classmethod
    def reads(cls, model_id: str) -> bool:
        """Whether this family loads ``model_id``: a file, folder or name."""
        return False

    @classmethod
    @abstractmethod
    def load(cls, model_id: str, options: LoadOptions) -> "Generator":
        """Load a model.

        Raises:
            ModelError: If it cannot be loaded or is not of this family.
        """

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """What is trained: an nn.Module with diffusers' ``dtype`` and gradient checkpointing."""

    @property
    def module(self) -> nn.Module:
        """The denoiser, by the name that all trainees have for what is trained."""
        return self.denoiser

    def replace_module(self, module: nn.Module) -> None:
        """Take another denoiser of the same architecture; UserError if that cannot be done."""
        raise UserError("the denoiser of this model cannot be replaced, as FSDP has to; take DDP")

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name; the first is the denoiser."""

    @property
    def width(self) -> int:
        """Channels that the denoiser's first layer makes: 320 in SDXL."""
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        return next(m.weight.shape[0] for m in self.denoiser.modules() if isinstance(m, kinds))

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Native image side in pixels."""

    @property
    @abstractmethod
    def latent_factor(self) -> int:
        """Pixels per latent pixel and side."""

    @property
    def size_multiple(self) -> int:
        """What the sides of images are multiples of, in pixels."""
        return self.latent_factor

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return device_of(next(self.denoiser.parameters()))

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latent of a ``height`` x ``width`` pixel image.

        Raises:
            UserError: For a size that the model does not make.
        """

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the noise that such an image is made of."""
        return self.latent_shape(height, width)

    def size_of_noise(self, noise_shape: Sequence[int]) -> Size:
        """Height and width in pixels of the image that a noise of this shape makes."""
        h, w = noise_shape[-2:]
        return h * self.latent_factor, w * self.latent_factor

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B = len(prompts) prompts, on the generator's device.

        A row never depends on its neighbours.
        """

    def told(self, prompts: Sequence[str], seeds: Sequence[int]) -> Conditioning:
        """Conditioning of B prompts, for images whose later noises, if any, come of B seeds."""
        return self.encode_prompts(prompts)

    def framed(self, conditioning: Conditioning, frames: Sequence[Frame]) -> Conditioning:
        """The same for pictures cut so, B of them; most models are not told of it."""
        return conditioning

    @property
    def draws_noise(self) -> bool:
        """Whether the sampler draws noise after the first one."""
        return False

    @abstractmethod
    def blank_prompts(self, count: int) -> Conditioning:
        """Zeros of the shape of ``count`` prompts' conditioning, on torch's default device."""

    @contextlib.contextmanager
    def kept_prompts(self, prompts: Collection[str], folder: Path) -> Iterator[None]:
        """Encode ``prompts`` now and keep them meanwhile: what encodes them will be moved away.

        What memory has no room for lies in ``folder``, which the caller removes.
        """
        self.encode_prompts([*prompts])
        yield

    def is_truncated(self, prompt: str) -> bool:
        """Whether ``prompt`` is longer than what the model reads of it."""
        return False

    def warn_of_cut(self, prompts: Iterable[str]) -> None:
        """Say once on stderr how many of these prompts are cut off, and which is the first."""
        limit = f"{self.prompt_tokens} tokens"
        self._told = warn_of_cut(prompts, self.is_truncated, self._told, limit)

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Latent [C, h, w] float32, on the generator's device, of an image [3, H, W] in [0, 1]."""

    def cached_latent(
        self, read: Callable[[], Tensor], key: Callable[[], Sequence[object]]
    ) -> Tensor:
        """Latent [C, h, w], on the CPU, of the image that ``read`` gives; a cache asks its key."""
        return self.encode_image(read()).cpu()

    @abstractmethod
    def predict(self, eps: Tensor, conditioning: Conditioning) -> Prediction:
        """One evaluation of the denoiser, differentiable with respect to noise and denoiser.

        ``eps`` is [B, C, h, w] float32, N(0, 1), the conditioning that of B prompts.
        """

    def latents(self, eps: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents [B, C, h, w] float32 that the sampler makes of noises ``eps``."""
        return self.predict(eps, conditioning).latents

    def evaluate(self, k: int, x: Tensor, conditioning: Conditioning) -> Prediction:
        """The evaluation in step ``k``, from 0, and the clean latents that it stands for.

        They are an estimate, and in the last step what the sampler gives. ``x`` [B, C, h, w] is the
        noise in step 0, and later what ``advance`` gave.
        """
        return self.predict(x, conditioning)

    def advance(self, k: int, x: Tensor, output: Tensor, conditioning: Conditioning) -> Tensor:
        """What step ``k + 1`` starts from, [B, C, h, w], by the output of ``evaluate(k, x, ...)``.

        Noise that the sampler draws here is a function of the conditioning's seeds and of ``k``.
        """
        raise UserError("this model takes one step; nothing comes after it")

    @abstractmethod
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32, about [-1, 1] RGB, of latents [B, C, h, w] float32.

        They are not clamped, and differentiable; ``ops.pixel_l1`` clamps and compares in one.
        """

    def images(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] RGB of latents [B, C, h, w], differentiable."""
        return unit_rgb(self.decode_raw(latents))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The same without gradient, one by one: less memory, and no image depends on another."""
        return torch.cat([self.images(row) for row in latents.split(1)])

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], noise: Tensor | None = None, *, seed: int = 0
    ) -> list[Image.Image]:
        """Pictures of B prompts.

        Args:
            prompts: The texts.
            noise: [B, C, h, w] float32, N(0, 1), such as one that was found; None draws it.
            seed: Of the noise that is drawn, for images of ``image_size``, and of what a sampler
                of several steps draws later.

        Returns:
            B images, 8-bit RGB.

        Raises:
            UserError: If there are not as many noises as prompts.
        """
        seeds = [derived_seed(seed, k) for k in range(len(prompts))]
        if noise is None:
            noise = gaussian(seeds, self.noise_shape(self.image_size, self.image_size))
        count = len(prompts)
        require(len(noise) == count, f"expected {count} noises, one per prompt, got {len(noise)}")
        latents = self.latents(noise.to(self.device), self.told(prompts, seeds))
        return [to_pil(image) for image in self.decode(latents)]

    def recompute(self, level: Recomputed) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        The level is "rewards": of what follows the latents; "full": of all; or "none".
        """
        if level == "full":
            self.denoiser.enable_gradient_checkpointing()

    def encoders(self, keep_decoder: bool) -> dict[str, list[nn.Module]]:
        """What only encodes, by the name of its network; with the decoder unless it is kept."""
        return {}

    def compile(self, mode: str = "default") -> None:
        """Compile the denoiser in a mode of torch.compile, or raise UserError."""
        raise UserError("this model is not compiled; leave --compile out")

    def use_channels_last(self) -> None:
        """Keep weights, and with them activations, in channels_last order."""
        for network in self.networks.values():
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def tune_decoder(
        self, tiny: str | None, dtype: torch.dtype | None, checkpointing: bool, tile: int
    ) -> None:
        """Decode as decoder_id and the other flags of the decoder say, or raise UserError."""
        raise UserError("this model has no decoder; leave the decoder's options out")

    def use_cache(self, folder: Path) -> None:
        """Keep encoded prompts and images in ``folder`` for other runs, or raise UserError."""
        raise UserError("this model encodes nothing; leave --cache_dir out")

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the whole model to ``folder``, atomically."""

    @property
    def layout(self) -> Layout | None:
        """That of the one file that ``save_single_file`` writes; None if there is none."""
        return None

    def check_single_file(self) -> None:
        """Raise UserError unless ``save_single_file`` can write this model."""
        raise UserError(
            "one file is written of models of the shape of SDXL, SD1, SD2, SD3, FLUX and Z-Image "
            "alone; leave --save_single_file out"
        )

    def save_single_file(self, folder: Path) -> None:
        """Write what ``save`` wrote to ``folder`` as one file, folder.safetensors, or UserError."""
        self.check_single_file()

    @property
    def save_dtype(self) -> torch.dtype | None:
        """Type that the denoiser's weights are saved in; None: that of its files."""
        return None

    @save_dtype.setter
    def save_dtype(self, dtype: torch.dtype | None) -> None:
        require(dtype is None, "this model is saved as it is; leave --save_dtype out")

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Take over the denoiser's weights from a folder of ``save``."""

    def originals(self) -> dict[str, Tensor]:
        """The denoiser's weights as its files have them, by name, on the CPU.

        Those in memory may be these in another type, rounded; if they were changed they count.
        """
        return {name: p.detach().cpu() for name, p in self.denoiser.named_parameters()}

    def save_adapter(
        self, weights: Mapping[str, Tensor], folder: Path, kohya: bool = False
    ) -> None:
        """Write an adapter, weights by their names in the denoiser, or raise UserError.

        It is written atomically; ``kohya`` is the format that ComfyUI and A1111 read.
        """
        raise UserError("this model takes no adapter; leave --lora_rank out")

    def check_kohya(self) -> None:
        """Raise UserError unless what ``save_adapter`` writes in kohya's names is read again."""
        raise UserError(
            "kohya's names of this model's weights are read by nothing here; leave --lora_format "
            "kohya out"
        )

    def read_adapter(self, path: Path) -> Adapter:
        """The denoiser's adapter in a LoRA file, to go on training it.

        Raises:
            UserError: If it is damaged, not for this model, or not for its denoiser alone.
        """
        raise UserError("this model takes no adapter; leave --lora_from out")

    def stack(self, loras: Sequence[LoraFile]) -> None:
        """Put LoRAs on the denoiser which stay adapters: without them it is the base.

        Raises:
            UserError: If one is damaged, not for this model, or not for its denoiser alone.
        """
        raise UserError("this model takes no adapter; leave --lora out")

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that change when what the model makes changes."""

    def settings(self, size: Size) -> dict[str, Any]:
        """What the result of a run with images of this size depends on, seed and options aside."""
        model, device = self.fingerprint(), self.device.type
        merged = {"lora": [lora.settings for lora in self.lora]} if self.lora else {}
        return {**size_fields(size), "model": model, "device": device, **merged}

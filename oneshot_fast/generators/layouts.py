"""What the single files of models' releases are called, and how the weights in them are named."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

DENOISER = "model.diffusion_model."  # how its names begin, where they do not stand alone
OPEN_CLIP = ".model."  # ends the prefix of a text encoder with OpenCLIP's names
CLIP_L = "text_encoders.clip_l.transformer."  # SD3's, of which diffusers reads no projection


@dataclass(frozen=True)
class Layout:
    """What the file of a family is called, and what is in it.

    Attributes:
        pipeline: diffusers' class.
        mark: How a name begins that only it has, behind ``DENOISER`` if the file has that.
        begins: Of modelspec's architecture, in small letters.
        architecture: The one that is written.
        prefixes: How the names of each network's tensors begin. With the denoiser alone, no more is
            written, nor read.
    """

    pipeline: str
    mark: str
    begins: tuple[str, ...]
    architecture: str
    prefixes: Mapping[str, str]


_LATENT = {"unet": DENOISER, "vae": "first_stage_model."}
SDXL = Layout(
    "StableDiffusionXLPipeline", "conditioner.embedders.1.", ("stable-diffusion-xl",),
    "stable-diffusion-xl-v1-base",
    {**_LATENT, "text_encoder": "conditioner.embedders.0.transformer.",
     "text_encoder_2": "conditioner.embedders.1.model."},
)  # fmt: skip
SD1 = Layout(
    "StableDiffusionPipeline", "cond_stage_model.transformer.", ("stable-diffusion-v1",),
    "stable-diffusion-v1", {**_LATENT, "text_encoder": "cond_stage_model.transformer."},
)  # fmt: skip
SD2 = Layout(
    "StableDiffusionPipeline", "cond_stage_model.model.", ("stable-diffusion-v2",),
    "stable-diffusion-v2", {**_LATENT, "text_encoder": "cond_stage_model.model."},
)  # fmt: skip
SD_TURBO = replace(  # SD2's, as Stability's later code names it
    SD2, mark="conditioner.embedders.0.model.",
    prefixes={**_LATENT, "text_encoder": "conditioner.embedders.0.model."},
)  # fmt: skip
SD3 = Layout(
    "StableDiffusion3Pipeline", "joint_blocks.0.",
    ("stable-diffusion-3", "stable-diffusion-v3", "sd3"), "stable-diffusion-3",
    {"transformer": DENOISER, "vae": "first_stage_model.", "text_encoder": CLIP_L,
     "text_encoder_2": "text_encoders.clip_g.transformer.",
     "text_encoder_3": "text_encoders.t5xxl.transformer."},
)  # fmt: skip
FLUX = Layout(
    "FluxPipeline", "double_blocks.0.img_mod.lin.", ("flux",), "flux-1", {"transformer": ""}
)
Z_IMAGE = Layout(
    "ZImagePipeline", "layers.0.adaLN_modulation.0.",
    ("z-image", "z_image", "zimage", "lumina"), "z-image", {"transformer": ""},
)  # fmt: skip
LAYOUTS = (SDXL, SD1, SD2, SD_TURBO, SD3, FLUX, Z_IMAGE)


def layout_of(names: Iterable[str]) -> Layout | None:
    """That of a single file, by the names of its tensors; None if they are those of none."""
    begins = {name.removeprefix(DENOISER) for name in names}
    return next(
        (found for found in LAYOUTS if any(name.startswith(found.mark) for name in begins)), None
    )

"""Pipelines of diffusers from one .safetensors file in the layout of SDXL's, or SD1's, release."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, one_line, refused
from oneshot_fast.generators.base import LoadOptions
from oneshot_fast.generators.pretrained import refuse_dangling
from oneshot_fast.runtime.tensor_files import common_dtype, read_header


@dataclass(frozen=True)
class Layout:
    """What the file of a family is called, and what is in it.

    Attributes:
        architecture: Of modelspec; how it begins.
        base: The one that is written.
        prefixes: How the names of each network's tensors begin.
    """

    architecture: str
    base: str
    prefixes: Mapping[str, str]


_COMMON = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
SDXL = Layout(
    "stable-diffusion-xl", "stable-diffusion-xl-v1-base",
    {**_COMMON, "text_encoder": "conditioner.embedders.0.",
     "text_encoder_2": "conditioner.embedders.1."},
)  # fmt: skip
SD1 = Layout(
    "stable-diffusion-v1", "stable-diffusion-v1", {**_COMMON, "text_encoder": "cond_stage_model."}
)
_NO_WEIGHTS = ("position_ids", "logit_scale")  # of CLIP, which encode no text


class PipelineFile:
    """A pipeline in one file; its networks can be read again as they lie there.

    Attributes:
        name: Of the file.
        stored: Type of each network's weights, by name; float32 where it is mixed or unknown.
        tensors: Type and shape of every tensor, by name.
        metadata: The file's header.
        layout: That of its family.
        model_config: Where the configs are; None takes those that diffusers knows.
        use: As of ``PipelineFolder``.
    """

    def __init__(self, family: type[Any], path: Path, options: LoadOptions) -> None:
        """Read the header.

        Args:
            family: Subclass of PipelineGenerator that it is read for.
            path: The file.
            options: Place of the configs.

        Raises:
            ModelError: If it is missing or damaged, or the configs are those of another pipeline.
        """
        refuse_dangling(path)
        if not path.is_file():
            raise ModelError("no such file")
        self._family, self._path, self.name = family, path, path.name
        found: Layout | None = getattr(family, "layout", None)
        if found is None:
            raise ModelError(f"{family.__name__} reads folders only")
        self.layout = found
        self.use: dict[str, float] = {}  # such a file does not say
        self._known = {"local_files_only": options.local_files_only}
        self.model_config = options.model_config
        self.tensors, self.metadata = read_header(path)
        self.stored = {
            part: common_dtype(kind for kind, _ in self._of(part).values()) for part in family.parts
        }
        if any(name.startswith("cond_stage_model.model.") for name in self.tensors):
            raise ModelError(
                "it is one file of Stable Diffusion 2; of these only folders are read: write one "
                "with diffusers, StableDiffusionPipeline.from_single_file(...).save_pretrained"
            )
        for start in ("model.diffusion_model.", self.layout.prefixes["text_encoder"]):
            if not any(name.startswith(start) for name in self.tensors):
                raise ModelError(
                    f"nothing in it is called {start}*: of single files only whole ones of SDXL "
                    "and SD1 are read; a transformer or UNet alone goes into a folder, see "
                    "docs/models.md"
                )
        if self.model_config is not None:
            self._check_config(self.model_config)

    def _check_config(self, place: str) -> None:
        refuse_dangling(Path(place))
        with refused(ModelError, f"--model_config {place}: "):
            named = self._family.pipeline.load_config(place, **self._known)["_class_name"]
        if named != self._family.pipeline.__name__:
            raise ModelError(
                f"--model_config {place} is of a {named}, the file is read as a "
                f"{self._family.pipeline.__name__}"
            )

    def read(self, dtype: torch.dtype | None, **given: nn.Module) -> Any:
        """As ``PipelineFolder.read``."""
        try:
            pipe = self._family.pipeline.from_single_file(
                str(self._path),
                config=self.model_config,
                dtype=dtype or torch.float32,
                **self._known,
                **given,
            )
        except Exception as error:  # diffusers raises many types here, bare Exception among them
            hint = " (offline? name a folder of configs with --model_config)"
            raise ModelError(one_line(error) + ("" if self.model_config else hint)) from error
        self._family.check(pipe)  # tells more than what does not fit
        for part in self._family.parts:
            network = getattr(pipe, part)
            self._check(part, network)
            if dtype is None and part not in given:
                network.to(self.stored[part])
        return pipe

    def _check(self, part: str, network: nn.Module) -> None:
        """Raise ModelError for a weight that the file lacks, or has too many."""
        for name, parameter in network.named_parameters():
            if parameter.is_meta:
                raise ModelError(f"its weights are incomplete: {part} has no {name}")
        # names differ, but not the number of values: attention's are only joined or squeezed
        left = Counter(value.numel() for value in network.parameters())
        for name, size in self._sizes(part).items():
            left[size] -= 3 if ".in_proj_" in name else 1
        if surplus := {size for size, count in left.items() if count < 0}:
            values = [value for value in network.parameters() if value.numel() in surplus]
            names = [name for name, size in self._sizes(part).items() if size in surplus]
            with safe_open(self._path, framework="pt") as file:
                unused = [name for name in names if not _among(file.get_tensor(name), values)]
            raise ModelError(
                f"its weights are of another model: {part} has no use for {(unused or names)[0]}"
            )

    def _sizes(self, part: str) -> dict[str, int]:
        """Number of values of each weight, of one of the three that attention's are joined of."""
        return {
            name: math.prod(shape) // (3 if ".in_proj_" in name else 1)
            for name, (_, shape) in self._of(part).items()
            if not name.endswith(_NO_WEIGHTS)
        }

    def _of(self, part: str) -> dict[str, tuple[str, list[int]]]:
        prefix = self.layout.prefixes[part]
        return {name: kind for name, kind in self.tensors.items() if name.startswith(prefix)}


def layout_of(path: Path) -> Layout:
    """That of a single file; SDXL's where it cannot be read, which ``PipelineFile`` will say."""
    try:
        tensors, _ = read_header(path)
    except (ModelError, OSError):
        return SDXL
    return SD1 if any(name.startswith("cond_stage_model.") for name in tensors) else SDXL


def _among(tensor: Tensor, values: Sequence[Tensor]) -> bool:
    return any(torch.equal(tensor.flatten().to(value), value.flatten()) for value in values)


def scheduler_of_file(source: PipelineFile, config: Any) -> Any:
    """The scheduler of a one-step model in one file: it says what it is, and carries none.

    Args:
        source: The file. Tensors ``v_pred`` and ``ztsnr`` mark a model by their presence.
        config: The scheduler of the configs. That of --model_config stays, and is told what it
            leaves open; diffusers' own, of the base model, has leading spacing, and is replaced.

    Raises:
        ModelError: If the file says that it is no such model, or its words contradict each other
            or those of --model_config.
    """
    if any(name.startswith("edm_") for name in source.tensors):
        raise ModelError("it has the mark edm_... of EDM: this model's step is not of this form")
    needed = source.layout.architecture
    kind = source.metadata.get("modelspec.architecture", needed)
    if not kind.startswith(needed) or kind.endswith(("/lora", "refiner", "inpainting")):
        raise ModelError(f"its modelspec.architecture is {kind}, but {needed}... is needed")
    said: dict[str, tuple[Any, str]] = {}

    def say(key: str, value: Any, where: str) -> None:
        before, first = said.setdefault(key, (value, where))
        if before != value:
            raise ModelError(f"{first} says {key} {before}, and {where} says {value}")

    if "v_pred" in source.tensors:
        say("prediction_type", "v_prediction", "its tensor v_pred")
    if "1step_x0" in source.name:  # SDXL-Lightning's
        say("prediction_type", "sample", "its name")
    if prediction := source.metadata.get("modelspec.prediction_type"):
        name = prediction.lower().replace("-", "_")
        name = {"v": "v_prediction", "v_pred": "v_prediction", "eps": "epsilon"}.get(name, name)
        say("prediction_type", name, "its header (modelspec.prediction_type)")
    if "ztsnr" in source.tensors:
        say("rescale_betas_zero_snr", True, "its tensor ztsnr")
        say("prediction_type", "v_prediction", "its tensor ztsnr")
    if source.model_config is not None:
        for key in ("prediction_type", "rescale_betas_zero_snr"):
            if key not in config.config.get("_use_default_values", ()):
                say(key, config.config[key], f"--model_config {source.model_config}")
    words = {key: value for key, (value, _) in said.items()}
    if source.model_config is not None:
        return type(config).from_config(config.config, **words)
    euler: Any = EulerAncestralDiscreteScheduler
    if words.get("prediction_type") == "sample":  # which the ancestral one does not know
        euler = EulerDiscreteScheduler
    return euler.from_config(config.config, timestep_spacing="trailing", **words)

"""Pipelines of diffusers from one .safetensors file in the layout of a model's own release."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
from safetensors import safe_open
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, one_line, refused
from oneshot_fast.generators.base import LoadOptions
from oneshot_fast.generators.layouts import DENOISER, LAYOUTS, SD2, SD_TURBO, layout_of
from oneshot_fast.generators.pretrained import (
    PipelineFolder,
    check_tokenizers,
    is_local,
    open_folder,
    pipeline_of,
    read_use,
    refuse_dangling,
    refuse_quantised,
)  # fmt: skip
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main
from oneshot_fast.runtime.tensor_files import common_dtype, misfit, read_header

# of CLIP, which encode no text, and what diffusers leaves out of SD2's
_NO_WEIGHTS = ("position_ids", "logit_scale")
_OF_SD2 = {
    name.replace(SD2.mark, layout.mark)
    for layout in (SD2, SD_TURBO)
    for name in SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
}
# parts, by their numbers of values, that diffusers makes of a tensor that is joined
_JOINED = {".in_proj_": (1, 1, 1), ".qkv.": (1, 1, 1), ".linear1.": (1, 1, 1, 4)}


class PipelineFile:
    """A pipeline in one file; its networks can be read again as they lie there.

    Networks that the file lacks come from the folder of ``model_config``.

    Attributes:
        name: Of the file.
        stored: Type of each network's weights, by name; float32 where it is mixed or unknown.
        tensors: Type and shape of every tensor, by name.
        metadata: The file's header.
        layout: That of its names; None for a denoiser alone with those of diffusers.
        model_config: Where the configs are; None takes those that diffusers knows.
        names: What its header calls it, beside its own name.
        use: As of ``PipelineFolder``, that of ``model_config``; a file does not say.
    """

    def __init__(self, family: type[Any], path: Path, options: LoadOptions) -> None:
        """Read the header.

        Args:
            family: Subclass of PipelineGenerator that it is read for.
            path: The file.
            options: Place of the configs.

        Raises:
            ModelError: If it is missing, damaged or of another kind, or the configs are those of
                another pipeline.
        """
        refuse_dangling(path)
        if not path.is_file():
            raise ModelError("no such file")
        self._family, self._path, self.name = family, path, path.name
        self.model_config = options.model_config
        of_config = {} if self.model_config is None else {"revision": options.revision}
        self._known = {"local_files_only": options.local_files_only, **of_config}
        self.tensors, self.metadata = read_header(path)
        if not self.tensors:
            raise ModelError("it is empty: it has no tensors")
        self.names = [v for k, v in self.metadata.items() if k == "modelspec.title"]
        if any(re.search(r"(^|[._])lora[._]", name.lower()) for name in self.tensors):
            raise ModelError("it is a LoRA: give it by --lora, and its base model by --model_id")
        refuse_quantised(self.tensors, "it")
        self.layout = layout_of(self.tensors)
        self._refuse_architecture()
        if self.model_config is not None:
            self._check_config(self.model_config)
        self._prefixes = self._find_prefixes()
        self._own = [part for part in family.parts if self._of(part)]
        lacks = {*family.parts} - {*self._own}
        if self.model_config is None and lacks - {*family.optional}:
            raise ModelError(
                f"it has no {', '.join(sorted(lacks))}: name the folder of a whole pipeline, which "
                "has them, by --model_config"
            )
        self._rest: PipelineFolder | None = None
        if lacks and self.model_config is not None:
            self._rest = open_folder(family, self.model_config, options, self._own)
        elif self.model_config is not None and is_local(self.model_config):
            check_tokenizers(Path(self.model_config))
        rest = self._rest
        self._configs = self.model_config if rest is None else str(rest.folder)
        self.use = {} if self._configs is None else read_use(Path(self._configs))
        self.stored = {} if rest is None else {k: v for k, v in rest.stored.items() if k in lacks}
        self._tell_of_others()
        for part in self._own:
            self.stored[part] = common_dtype(kind for kind, _ in self._of(part).values())

    def _tell_of_others(self) -> None:
        """Say what is not read, such as averaged weights, and where the rest is from."""
        begins = tuple(self._prefixes.values())
        others = [  # a scheduler's constants and marks have no point
            name for name in self.tensors if "." in name and not name.startswith(begins)
        ]
        if others and is_main():
            kept = f"; {', '.join(self.stored)} are those of {self.model_config}"
            say(
                f"{self._path}: {len(others)} of its tensors, such as {others[0]}, are not read"
                + (kept if self.stored else "")
            )

    def _refuse_architecture(self) -> None:
        """Raise ModelError if the header names another architecture than the names are of."""
        kind = self.metadata.get("modelspec.architecture")
        begins = ("",) if self.layout is None else self.layout.begins
        other = kind is not None and not kind.lower().startswith(begins)
        if kind is not None and (other or kind.endswith(("/lora", "refiner", "inpainting"))):
            needed = f"but {begins[0]}... is needed" if other else "which is not read"
            raise ModelError(f"its modelspec.architecture is {kind}, {needed}")

    def _find_prefixes(self) -> dict[str, str]:
        """How the names of each network's tensors begin."""
        denoiser = self._family.parts[0]
        found = {} if self.layout is None else dict(self.layout.prefixes)
        is_alone = not any(name.startswith(DENOISER) for name in self.tensors)
        if self.layout is None and self.model_config is None:
            raise ModelError(
                "its names are not those of a whole file of "
                f"{', '.join(sorted({layout.pipeline for layout in LAYOUTS}))}; a UNet or "
                "transformer alone needs the folder of a whole pipeline, --model_config"
            )
        if is_alone and (others := [p for p in found.values() if self._begins(p) and p]):
            raise ModelError(f"nothing in it is called {DENOISER}*, but there is {others[0]}*")
        return {**found, denoiser: "" if is_alone else DENOISER}

    def _begins(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)

    def _check_config(self, place: str) -> None:
        folder = Path(place)
        refuse_dangling(folder)
        if is_local(place) and not (folder / "model_index.json").is_file():
            raise ModelError(
                f"--model_config {place}: no model_index.json there; give a diffusers folder or a "
                "hub id"
            )
        with refused(ModelError, f"--model_config {place}: "):
            named = self._family.pipeline.load_config(place, **self._known)["_class_name"]
        if named != self._family.pipeline.__name__:
            raise ModelError(
                f"--model_config {place} is of a {named}, the file is read as a "
                f"{self._family.pipeline.__name__}"
            )

    def read(self, dtype: torch.dtype | None, **given: nn.Module) -> Any:
        """As ``PipelineFolder.read``."""
        own = [part for part in self._family.parts if self._of(part) and part not in given]
        try:
            pipe = self._pipe(own, dtype, given)
        except ModelError:
            raise
        except (KeyError, IndexError) as error:  # of diffusers' conversion
            lacks = f": it has no {error.args[0]}" if isinstance(error, KeyError) else ""
            raise ModelError(f"its weights are incomplete, or of another model{lacks}") from None
        except Exception as error:  # diffusers raises many types here, bare Exception among them
            hint = " (offline? name a folder of configs with --model_config)"
            raise ModelError(one_line(error) + ("" if self.model_config else hint)) from error
        self._family.check(pipe)  # tells more than what does not fit
        for part in own:
            network = getattr(pipe, part)
            self._check(part, network)
            if dtype is None:
                network.to(self.stored[part])
        return pipe

    def _pipe(
        self, own: Sequence[str], dtype: torch.dtype | None, given: Mapping[str, nn.Module]
    ) -> Any:
        """The pipeline, with its networks ``own`` from the file."""
        kind, rest, networks = self._family.pipeline, self._rest, dict[str, Any](given)
        place = self._configs
        for part in self._family.parts[:2]:  # denoiser and VAE
            if part in own and place is not None:
                networks[part] = self._network(part, place, dtype)
        if rest is not None and not {*own} - networks.keys():
            return rest.read(dtype, **networks)
        if rest is not None:
            networks |= dict.fromkeys(rest.absent)
            for part in self.stored.keys() - {*self._own} - networks.keys():
                networks[part] = rest.network(part, dtype)
        how = {"dtype": dtype or torch.float32, **self._known}
        return kind.from_single_file(str(self._path), config=place, **how, **networks)

    def _network(self, part: str, place: str, dtype: torch.dtype | None) -> nn.Module:
        """One of the networks that are diffusers' own, with the config at ``place``."""
        kind = self._class_of(part, place)
        config = kind.load_config(place, subfolder=part, **self._known)
        with torch.device("meta"):
            expected = kind.from_config(config).state_dict()
        prefix = self._prefixes[part]
        with safe_open(self._path, framework="pt") as file:
            weights = {k.removeprefix(prefix): file.get_tensor(k) for k in self._of(part)}
        if weights.keys() != expected.keys():
            convert = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
            given = {f"{prefix or DENOISER}{name}": value for name, value in weights.items()}
            try:
                weights = convert(checkpoint=given, config=config)
            except ValueError:  # it finds no block's number
                raise ModelError(
                    f"its weights are of another model: {part} has an unknown {min(weights)}"
                ) from None
        wrong = misfit(
            {
                "missing_keys": expected.keys() - weights.keys(),
                "unexpected_keys": weights.keys() - expected.keys(),
                "mismatched_keys": [
                    (name, value.shape, expected[name].shape)
                    for name, value in weights.items()
                    if name in expected and value.shape != expected[name].shape
                ],
            }
        )
        if wrong:
            what = "incomplete" if wrong.startswith("no ") else "of another model"
            raise ModelError(f"its weights are {what}: {part} has {wrong}")
        dtype = dtype or self.stored[part]
        found: nn.Module = kind.from_single_file(
            weights, config=place, subfolder=part, dtype=dtype,
            config_revision=self._known.get("revision"), **self._known,
        )  # fmt: skip
        return found

    def _class_of(self, part: str, place: str) -> Any:
        name = self._family.pipeline.load_config(place, **self._known)[part][1]
        if name not in SINGLE_FILE_LOADABLE_CLASSES:
            raise ModelError(
                f"diffusers reads no single file of a {name}; put it into a folder, see "
                "docs/models.md"
            )
        return getattr(diffusers, name)

    def _check(self, part: str, network: nn.Module) -> None:
        """Raise ModelError for a weight that the file lacks, or has too many."""
        for name, parameter in network.named_parameters():
            if parameter.is_meta:
                raise ModelError(f"its weights are incomplete: {part} has no {name}")
        # names differ, but not the numbers of values: tensors are only joined or squeezed
        held = [*network.state_dict().values()]
        left = Counter(value.numel() for value in held)
        left.subtract(size for sizes in self._sizes(part).values() for size in sizes)
        if surplus := {size for size, count in left.items() if count < 0}:
            values = [value for value in held if value.numel() in surplus]
            names = [name for name, sizes in self._sizes(part).items() if surplus & {*sizes}]
            with safe_open(self._path, framework="pt") as file:
                unused = [name for name in names if not _among(file.get_tensor(name), values)]
            raise ModelError(
                f"its weights are of another model: {part} has no use for {(unused or names)[0]}"
            )

    def _sizes(self, part: str) -> dict[str, list[int]]:
        """Numbers of values of each weight, one for each that diffusers makes of it."""
        found = dict[str, list[int]]()
        for name, (_, shape) in self._of(part).items():
            if name.endswith(_NO_WEIGHTS) or name in _OF_SD2:
                continue
            cuts = next((cuts for key, cuts in _JOINED.items() if key in name), (1,))
            found[name] = [math.prod(shape) * cut // sum(cuts) for cut in cuts]
        return found

    def _of(self, part: str) -> dict[str, tuple[str, list[int]]]:
        if part not in self._prefixes:
            return {}
        prefix = self._prefixes[part]
        return {name: kind for name, kind in self.tensors.items() if name.startswith(prefix)}


def pipeline_of_file(path: Path, options: LoadOptions) -> str | None:
    """Name of the pipeline's class of a single file; None if it cannot be told."""
    try:
        layout = layout_of(read_header(path)[0])
    except (ModelError, OSError):  # what is wrong with it is said when it is opened
        return None
    if layout is None and options.model_config is not None:
        return pipeline_of(options.model_config, options)
    return None if layout is None else layout.pipeline


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
    said: dict[str, tuple[Any, str]] = {}

    def note(key: str, value: Any, where: str) -> None:
        before, first = said.setdefault(key, (value, where))
        if before != value:
            raise ModelError(f"{first} says {key} {before}, and {where} says {value}")

    if "v_pred" in source.tensors:
        note("prediction_type", "v_prediction", "its tensor v_pred")
    if "1step_x0" in source.name:  # SDXL-Lightning's
        note("prediction_type", "sample", "its name")
    if prediction := source.metadata.get("modelspec.prediction_type"):
        name = prediction.lower().replace("-", "_")
        name = {"v": "v_prediction", "v_pred": "v_prediction", "eps": "epsilon"}.get(name, name)
        note("prediction_type", name, "its header (modelspec.prediction_type)")
    if "ztsnr" in source.tensors:
        note("rescale_betas_zero_snr", True, "its tensor ztsnr")
        note("prediction_type", "v_prediction", "its tensor ztsnr")
    if source.model_config is not None:
        for key in ("prediction_type", "rescale_betas_zero_snr"):
            if key not in config.config.get("_use_default_values", ()):
                note(key, config.config[key], f"--model_config {source.model_config}")
    words = {key: value for key, (value, _) in said.items()}
    is_open = source.layout in (SD2, SD_TURBO) and "prediction_type" not in words
    if is_open and source.model_config is None:
        raise ModelError(
            "it does not say whether it predicts epsilon (as SD-Turbo) or v: give the folder of a "
            "whole pipeline that does by --model_config"
        )
    if source.model_config is not None:
        return type(config).from_config(config.config, **words)
    euler: Any = EulerAncestralDiscreteScheduler
    if words.get("prediction_type") == "sample":  # which the ancestral one does not know
        euler = EulerDiscreteScheduler
    return euler.from_config(config.config, timestep_spacing="trailing", **words)

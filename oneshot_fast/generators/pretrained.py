"""Pipelines of diffusers from a folder or the hub, every weight in its place."""

import importlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from oneshot_fast.embedded.pipeline import model_path, teacher_path
from oneshot_fast.errors import ModelError, one_line, refused
from oneshot_fast.generators.base import LoadOptions
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main
from oneshot_fast.runtime.tensor_files import common_dtype, misfit, read_header, refuse_text

# models in the package, by name, and what replaces parts of the first
PACKAGED = {"tiny": None, "tiny-teacher": teacher_path()}
# what a saved model has to be used with, {"timestep": 399} or {"embedded_guidance": 1.0}; the
# hub's files in there all come along
USE_FILE = "scheduler/oneshot_fast.json"
_NOT_READ = ("lm_head.weight",)  # of language models, which encode without it
_KEPT = ("safety_checker", "image_encoder")  # of what pipelines have more, saved as they came
_WEIGHTS = ("diffusion_pytorch_model", "pytorch_model", "model")
_TEXTS, _OBJECTS = (".json", ".txt", ".model"), ("config.json", ".index.json")
# of a tokenizer
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class PipelineFolder:
    """A pipeline in a folder; its networks can be read again as they lie there.

    Attributes:
        stored: Type of each network's weights, by name; float32 where it is mixed or unknown.
        names: What it says that it was made of, beside its own name.
        absent: Names of networks and tokenizers that it goes without.
        use: What the folder says that it has to be used with, of "timestep", at which the one step
            begins, and "embedded_guidance".
    """

    def __init__(
        self,
        family: type[Any],
        folder: Path,
        variant: str | None = None,
        own: Path | None = None,
        given: Collection[str] = (),
    ) -> None:
        """Choose the files of each network.

        Args:
            family: Subclass of PipelineGenerator that it is read for.
            folder: Where its networks are, in diffusers layout.
            variant: Of the files; plain ones serve where a network lacks it, and else what it has.
            own: Folder of a scheduler and of networks that are read instead of those in ``folder``.
            given: Networks that ``read`` will always be given, whose weights need not be there.

        Raises:
            ModelError: If something is missing.
        """
        self.folder, self._family, self._own = folder, family, own
        optional = {*family.optional, *_KEPT}
        found = {k: _class(folder, k, k in optional) for k in (*family.parts, *_KEPT)}
        self._classes = {part: kind for part, kind in found.items() if kind is not None}
        # diffusers wants to be told of what is not there
        absent = {*family.parts} - self._classes.keys()
        index = _read_object(folder / "model_index.json")
        if not index.get("_class_name"):
            raise ModelError("model_index.json has no _class_name, the pipeline that it is of")
        check_tokenizers(folder)
        tokenizers = {part.replace("text_encoder", "tokenizer") for part in absent}
        for name in ("scheduler", *self._classes):
            _refuse_damaged(self._place(name) / name)
        self.absent = absent | {name for name in tokenizers if not any(index.get(name) or ())}
        held = [part for part in self._classes if part not in given]
        weights = {part: _weights(self._place(part) / part, variant) for part in held}
        self._variants = {part: chosen for part, (chosen, _) in weights.items()}
        self.stored = {part: dtype for part, (_, dtype) in weights.items()}
        self.use, denoiser = read_use(folder), family.parts[0]
        config = self._place(denoiser) / denoiser / "config.json"
        of = [index, *([_read_object(config)] if config.is_file() else [])]
        self.names = [str(said["_name_or_path"]) for said in of if said.get("_name_or_path")]
        only = {part: v for part, v in self._variants.items() if v not in (variant, None)}
        if only and is_main():
            listed = ", ".join(f"{part} ({v})" for part, v in only.items())
            say(f"{folder}: has no other files of {listed}; these are taken")

    def read(self, dtype: torch.dtype | None, **given: nn.Module) -> Any:
        """The pipeline, on the CPU.

        Args:
            dtype: Of the weights; None reads them as they are stored.
            **given: Networks that need not be read.

        Raises:
            ModelError: If it cannot be read, or a weight is missing, unknown or of another shape.
        """
        networks, wrong = dict[str, Any](given) | dict.fromkeys(self.absent), None
        for part in self._classes.keys() - given.keys():
            networks[part], misfit = self._load(part, None if part in _KEPT else dtype)
            wrong = wrong or (None if part in _KEPT else misfit)
        if self._own is not None:
            named = _read_object(self._own / "scheduler" / "scheduler_config.json")["_class_name"]
            kind = getattr(diffusers, named)
            networks["scheduler"] = kind.from_pretrained(self._own, subfolder="scheduler")
        with refused(ModelError):
            pipe = self._family.pipeline.from_pretrained(
                self.folder, dtype=dtype or torch.float32, local_files_only=True, **networks
            )
        self._family.check(pipe)  # tells more than what does not fit
        if wrong:
            raise ModelError(wrong)
        return pipe

    def network(self, part: str, dtype: torch.dtype | None) -> nn.Module:
        """One of the networks, as ``read`` does."""
        network, wrong = self._load(part, dtype)
        if wrong:
            raise ModelError(wrong)
        return network

    def _place(self, part: str) -> Path:
        own = self._own
        return own if own is not None and (own / part).is_dir() else self.folder

    def _load(self, part: str, dtype: torch.dtype | None) -> tuple[nn.Module, str | None]:
        network, wrong = load_network(
            self._classes[part],
            self._place(part),
            part,
            dtype=dtype or self.stored[part],
            variant=self._variants[part],
            local_files_only=True,
        )
        if dtype is None:  # transformers keeps a part of T5 in float32
            network.to(self.stored[part])
        return network, wrong


def open_folder(
    family: type[Any], source: str, options: LoadOptions, given: Collection[str] = ()
) -> PipelineFolder:
    """The pipeline at ``source``: packaged, a local folder or a hub id, which is downloaded.

    Networks that are ``given`` to each reading need no weights there.

    Raises:
        ModelError: If it is not there, or something of it is missing.
    """
    if source in PACKAGED:
        return PipelineFolder(family, model_path(), options.variant, PACKAGED[source])
    folder = Path(source)
    refuse_dangling(folder)
    if not is_local(source):
        folder = _download(family.pipeline, source, options)
    elif folder.is_file():
        raise ModelError("of single files only .safetensors are read; convert it with diffusers")
    elif not (folder / "model_index.json").is_file():
        raise ModelError("no model_index.json there; give a diffusers folder, a hub id or a file")
    return PipelineFolder(family, folder, options.variant, given=given)


def _download(kind: type[Any], source: str, options: LoadOptions) -> Path:
    errors: list[Exception] = []
    for variant in dict.fromkeys((options.variant, None, "fp16")):
        try:
            return Path(
                kind.download(
                    source,
                    variant=variant,
                    revision=options.revision,
                    local_files_only=options.local_files_only,
                )
            )
        except Exception as error:  # diffusers raises many types for an absent model
            errors.append(error)
    raise ModelError(
        "it is no local folder, and the hub did not give it; download it first, or check the "
        f"name and the network ({one_line(errors[0]):.150})"
    )


def load_network(
    kind: Any, folder: Path | str, part: str = "", **how: Any
) -> tuple[Any, str | None]:
    """A network of a class of diffusers or transformers, and what is wrong with its weights.

    Args:
        kind: The class.
        folder: Folder or hub id.
        part: Subfolder, and its name in messages.
        **how: As for the class's ``from_pretrained``.

    Returns:
        The network, and None or the weight that is missing, unknown or of another shape.

    Raises:
        ModelError: If it cannot be read.
    """
    if isinstance(folder, Path) and not (folder / part / "config.json").is_file():
        raise ModelError(f"there is no {Path(part) / 'config.json'}")
    with refused(ModelError, f"{part}: " if part else ""):
        network, info = kind.from_pretrained(
            folder, subfolder=part, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    unknown = [key for key in info["unexpected_keys"] if key not in _NOT_READ]
    wrong = misfit({**info, "unexpected_keys": unknown})
    if wrong is None:
        return network, None
    what = "incomplete" if wrong.startswith("no ") else "of another model"
    return network, f"its weights are {what}: {part or 'it'} has {wrong}"


def refuse_dangling(path: Path) -> None:
    """Raise ModelError if ``path``, or something in it, is a link to what is not there."""
    for link in (path, *path.glob("*"), *path.glob("*/*")):
        if link.is_symlink() and not link.exists():
            raise ModelError(
                f"{link} is a link to {link.readlink()}, which is not there; copy what links point "
                "to as well (cp -rL)"
            )


def pipeline_of(source: str, options: LoadOptions) -> str | None:
    """Name of the pipeline's class at a local folder or hub id; None if that cannot be told."""
    try:
        if is_local(source):
            return _read_object(Path(source) / "model_index.json").get("_class_name")
        named = DiffusionPipeline.load_config(
            source, revision=options.revision, local_files_only=options.local_files_only
        )
        return str(named["_class_name"])
    except Exception:  # what is wrong with it is said when it is opened
        return None


def is_local(source: str) -> bool:
    """Whether ``source`` is a place here, not a hub id."""
    folder = Path(source)
    return folder.is_absolute() or source.startswith(".") or folder.exists()


def check_tokenizers(folder: Path) -> None:
    """Raise ModelError if a tokenizer of a pipeline's folder is damaged, or has no vocabulary.

    transformers makes an empty one of one without.
    """
    index = _read_object(folder / "model_index.json")
    for name in [name for name in index if name.startswith("tokenizer") and any(index[name] or ())]:
        if not any((folder / name / file).is_file() for file in _VOCABULARIES):
            raise ModelError(f"there is no {name}/tokenizer.json, nor another vocabulary")
        _refuse_damaged(folder / name)


def _refuse_damaged(folder: Path) -> None:
    """Raise ModelError for what cannot be a configuration or vocabulary in a pipeline's folder."""
    for path in sorted(folder.glob("*")):
        if path.suffix in _TEXTS and path.is_file():
            refuse_text(path)
            if path.name.endswith(_OBJECTS):
                _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    refuse_text(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found.items())
    except (AttributeError, ValueError) as error:
        place = path.name if path.name == "model_index.json" else f"{path.parent.name}/{path.name}"
        raise ModelError(f"{place} is damaged: {one_line(error)}") from None


def read_use(folder: Path) -> dict[str, float]:
    """What the model in ``folder`` has to be used with, as ``write_use`` wrote it."""
    path = folder / USE_FILE
    found = _read_object(path) if path.is_file() else {}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{USE_FILE} is damaged: {name} is {one_line(value)}, not a number")
    return found


def write_use(folder: Path, use: Mapping[str, float]) -> None:
    """Write what the model in ``folder`` has to be used with, if anything."""
    if use:
        (folder / USE_FILE).write_text(json.dumps(use))


def _class(folder: Path, part: str, is_optional: bool) -> Any:
    """Class of a network, as model_index.json names it; None for one that is not there."""
    entry = _read_object(folder / "model_index.json").get(part) or (None, None)
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise ModelError(f"model_index.json is damaged: {part} is {one_line(entry)}")
    library, name = entry
    if name is None and is_optional:
        return None
    if name is None:
        raise ModelError(f"the pipeline has no {part}")
    found = None
    if library in ("diffusers", "transformers", "stable_diffusion"):
        own = f"diffusers.pipelines.{library}" if library == "stable_diffusion" else library
        found = getattr(importlib.import_module(own), str(name), None)
    if found is None:
        raise ModelError(f"its {part} is a {name} of {library}, which is not known here")
    return found


def refuse_quantised(header: Mapping[str, tuple[str, Any]], what: str) -> None:
    """Raise ModelError if a weight in a safetensors header is of integers or of 8 bits."""
    for key, (kind, _) in header.items():
        if key.endswith(".weight") and kind not in ("F64", "F32", "F16", "BF16"):
            raise ModelError(f"{what} is quantised: {key} is of {kind}; take its own weights")


def _weights(folder: Path, wanted: str | None) -> tuple[str | None, torch.dtype]:
    """Variant of a network's files that is read, None being the plain one, and its type."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        base, *variant = re.sub(r"-\d+-of-\d+", "", path.name).split(".")
        if base in _WEIGHTS and variant and variant.pop() in ("safetensors", "bin"):
            found.setdefault(".".join(variant) or None, []).append(path)
    if not found:
        raise ModelError(f"there are no weights of {folder.name}")
    named = sorted(filter(None, found))
    chosen = next(v for v in (wanted, None, "fp16", *named) if v in found)
    for path in found[chosen]:
        refuse_text(path)
    headers = [read_header(path)[0] for path in found[chosen] if path.suffix == ".safetensors"]
    for header in headers:
        refuse_quantised(header, folder.name)
    return chosen, common_dtype(kind for header in headers for kind, _ in header.values())

"""LoRA files of diffusers, peft, kohya's scripts and RTDMD, read by diffusers' own loaders."""

import copy
import hashlib
import json
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oneshot_fast.data.image_refs import file_sha256
from oneshot_fast.errors import ModelError, UserError, one_line, require
from oneshot_fast.generators.rtdmd_files import (
    DIFFUSERS_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    TORCH,
    is_rtdmds,
    peft_config,
    read_rtdmds,
)
from oneshot_fast.runtime.tensor_files import read_header, read_safetensors

# how torch and transformers name a weight of another shape
_MISFIT = re.compile(r"size mismatch for (\S+):|^(\S*\.lora_\S+) *\| *MISMATCH", re.MULTILINE)
_UNSUPPORTED = {
    "dora_scale": "DoRA's magnitudes",
    "lora_magnitude_vector": "DoRA's magnitudes",
    ".bias": "a bias",
}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that is merged when a generator is loaded.

    Attributes:
        path: A .safetensors file, or RTDMD's .pt file.
        weight: Factor of its change of the weights.
        alpha: Scale times rank of a file of RTDMD that has no adapter_config.json beside it, which
            says it; None is twice the rank.
    """

    path: Path
    weight: float = 1.0
    alpha: float | None = None

    @classmethod
    def parse(cls, text: str, alpha: float | None = None) -> "LoraFile":
        """Read FILE or FILE:WEIGHT, as on the command line.

        Raises:
            UserError: If there is no such file, or the weight is 0 or no number.
        """
        name, _, number = text.rpartition(":")
        if not name or Path(text).exists():
            return cls(weights_of(Path(text), f"--lora {text}"), alpha=alpha)
        try:
            weight = float(number)
        except ValueError:
            raise UserError(f"--lora {text}: no such file; give FILE or FILE:WEIGHT") from None
        usable = math.isfinite(weight) and weight != 0
        require(usable, f"--lora {text}: the weight is {number}; give a finite number other than 0")
        return cls(weights_of(Path(name), f"--lora {text}"), weight, alpha)

    @property
    def has_alpha(self) -> bool:
        """Whether the file, or the one beside it, says its alpha."""
        return not is_rtdmds(self.path) or (self.path.parent / PEFT_CONFIG).is_file()

    @property
    def settings(self) -> dict[str, Any]:
        """What a run notes of it."""
        noted = {"file": self.path.name, "sha256": lora_sha256(self.path), "weight": self.weight}
        return noted if self.has_alpha else noted | {"alpha": self.alpha}


class Adapters:
    """LoRAs of a pipeline's networks, beside copies of these that have no weights of their own."""

    def __init__(
        self,
        pipe: Any,
        parts: Sequence[str],
        files: Sequence[Path | LoraFile],
        flag: str,
    ) -> None:
        """Read ``files`` for a pipeline of diffusers, whose networks stay as they are.

        Args:
            pipe: The pipeline.
            parts: Names of its networks; the first is the denoiser.
            files: What to read.
            flag: What named them, for messages.

        Raises:
            ModelError: If a file is damaged, or a key in it is not one of this model.
        """
        parts = [part for part in parts if getattr(pipe, part) is not None]
        shadow = copy.copy(pipe)
        for part in parts:
            setattr(shadow, part, _shadow(getattr(pipe, part)))
        if not hasattr(pipe, "load_lora_weights") and parts[0] == "transformer":  # PixArt's
            from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin

            adopt(shadow, SanaLoraLoaderMixin)  # which has nothing of SANA's own
            adopt(shadow.transformer, PeftAdapterMixin)
        if not hasattr(shadow, "load_lora_weights"):
            raise ModelError(f"{flag}: a {type(pipe).__name__} takes no LoRA; leave {flag} out")
        self._networks = {part: getattr(shadow, part) for part in parts}
        loras = [file if isinstance(file, LoraFile) else LoraFile(file) for file in files]
        self._said = f"{flag} {loras[0].path}: "
        for k, lora in enumerate(loras):
            with torch.random.fork_rng(devices=[]):  # adapters are drawn before they are read
                self._read(shadow, parts[0], lora, str(k), f"{flag} {lora.path}: ")

    def _read(self, pipe: Any, denoiser: str, lora: LoraFile, name: str, said: str) -> None:
        raw, metadata = _read_file(lora, denoiser, said)
        for part, what in _UNSUPPORTED.items():
            key = next((key for key in raw if key.endswith(part) or f"{part}." in key), None)
            if key is not None:
                raise ModelError(f"{said}{key} is {what}, which is not supported")
        convert, converted = pipe.lora_state_dict, dict[str, Tensor]()

        def given(_: object, **how: Any) -> Any:
            found, *rest, _metadata = convert(dict(raw), **how)
            converted.update(found)
            return found, *rest, metadata

        pipe.lora_state_dict = given
        before = _adapters(self._networks)
        try:
            with _warnings() as told:
                pipe.load_lora_weights({}, adapter_name=name, low_cpu_mem_usage=True)
        except Exception as error:  # diffusers and peft raise many types here
            wrong = _MISFIT.search("\n".join([str(error), *told]))
            text = f"{wrong[1] or wrong[2]} has another shape" if wrong else one_line(error)
            if (
                wrong is None
                and not isinstance(error, KeyError)
                and not any(k in text for k in raw)
            ):
                key = next((key for key in raw if "lora" not in key), next(iter(raw)))
                text = f"{key} ({text})"
            raise ModelError(f"{said}it is not for this model: {text}") from None
        finally:
            pipe.lora_state_dict = convert
        new = {k: v for k, v in _adapters(self._networks).items() if k not in before}
        if key := next((key for key, value in new.items() if value.is_meta), None):
            raise ModelError(f"{said}it has no weights of {key}, which its configuration names")
        added = [*new.values()]
        if key := _unused(raw, converted, added, told):
            raise ModelError(f"{said}it is not for this model, which has no use for {key}")
        # diffusers loses kohya's alphas of attention where they differ
        scales = _scales(raw, said)
        for network in self._networks.values():
            for _, layer in _layers(network):
                if name in layer.scaling:
                    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                    scale = scales.get((_content(A), _content(B)))
                    layer.scaling[name] = layer.scaling[name] if scale is None else scale
        for value in _adapters(self._networks).values():
            value.data = value.data.double()

    def adapts(self, part: str) -> bool:
        """Whether a weight of a network changes."""
        return any(True for _ in _layers(self._networks[part]))

    def change(self, part: str, weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
        """Names of the weights of a network that change, and by what, in float64.

        Each file's change is multiplied by its number in ``weights``.
        """
        for module, layer in _layers(self._networks[part]):
            total: Tensor | None = None
            for k, weight in enumerate(weights):
                if str(k) in layer.scaling:
                    delta = weight * layer.get_delta_weight(str(k))
                    total = delta if total is None else total + delta
            if total is not None:
                yield f"{module}.weight", total

    @torch.no_grad()
    def merge(
        self,
        part: str,
        network: nn.Module,
        weights: Sequence[float],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add the changes to a network: in float64, and rounded once to the type it has.

        With ``dtype`` the weights that change are rounded once to this type, and have it then.
        """
        parameters = dict(network.named_parameters())
        for name, delta in self.change(part, weights):
            value = parameters[name]
            total = value.double() + delta.to(value.device)
            value.data = total.to(dtype or value.dtype)

    def trainable(self, part: str) -> "Adapter":
        """The first file's adapter of a network.

        Raises:
            ModelError: If the file has none, adapts other networks, too, or is no plain LoRA.
        """
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        for other, network in self._networks.items():
            name = next((name for name, _ in _layers(network)), None)
            if other != part and name is not None:
                raise ModelError(
                    f"{self._said}it also adapts {other} ({name}), which is not trained; merge it "
                    "into the model (python -m oneshot_fast.lora merge)"
                )
        layers = dict(_layers(self._networks[part]))
        other_kind = next((k for k, v in layers.items() if not isinstance(v, LoraLayer)), None)
        if not layers or other_kind is not None:
            which = f"of {other_kind or part} that could be trained"
            raise ModelError(f"{self._said}it has no LoRA {which}")
        ranks = {name: int(layer.r["0"]) for name, layer in layers.items()}
        alphas = {name: layer.scaling["0"] * ranks[name] for name, layer in layers.items()}
        rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="|".join(map(re.escape, layers)),  # matched as a whole, as no list is
            rank_pattern={f"^{re.escape(k)}": r for k, r in ranks.items() if r != rank},
            alpha_pattern={f"^{re.escape(k)}": a for k, a in alphas.items() if a != alpha},
        )
        weights = {
            f"{name}.{kind}.default.weight": getattr(layer, kind)["0"].weight.detach().float()
            for name, layer in layers.items()
            for kind in ("lora_A", "lora_B")
        }
        return Adapter(rank, alpha, config, weights)


@dataclass(frozen=True)
class Adapter:
    """A LoRA that a training goes on with.

    Attributes:
        rank: Rows of A, of most modules.
        alpha: Scale times rank, of most modules.
        config: peft's, with those of the others.
        weights: By their names in the adapted network, float32.
    """

    rank: int
    alpha: float
    config: Any
    weights: Mapping[str, Tensor]


class MergedSource:
    """A source of a pipeline's networks, with LoRAs merged into each that is read.

    Attributes:
        stored: Type of each network's weights, by name; merging keeps it.
    """

    def __init__(
        self,
        source: Any,
        parts: Sequence[str],
        loras: Sequence[LoraFile],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Describe it.

        Args:
            source: A ``PipelineFolder`` or a ``PipelineFile``.
            parts: Names of its networks; the first is the denoiser.
            loras: What is merged.
            dtype: Type that the sums are rounded to; None is that of the files.
        """
        self._source, self._parts, self._dtype = source, parts, dtype
        self._loras, self.stored = loras, source.stored
        self._adapters: Adapters | None = None

    def read(self, dtype: torch.dtype | None, **given: nn.Module) -> Any:
        """As ``PipelineFolder.read``; networks that are given stay as they are."""
        pipe = self._source.read(None, **given)
        if self._adapters is None:
            self._adapters = Adapters(pipe, self._parts, self._loras, "--lora")
        merged = dict(given)
        for part in self._parts:
            network = getattr(pipe, part)
            if part not in given and network is not None and self._adapters.adapts(part):
                weights = [lora.weight for lora in self._loras]
                self._adapters.merge(part, network, weights, self._dtype)
                merged[part] = network.to(dtype or self.stored[part])
        # the others in the types that they have without LoRAs
        return pipe if dtype is None else self._source.read(dtype, **merged)


def adopt(thing: Any, mixin: type[Any]) -> None:
    """Give a pipeline or network of diffusers what ``mixin`` can; files name its class the same."""
    kind = type(thing)
    if not issubclass(kind, mixin):
        thing.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def check_alpha(alpha: float | None, files: Sequence[LoraFile]) -> None:
    """Raise UserError if ``alpha`` is no positive number, or all ``files`` say their own."""
    require(alpha is None or 0 < alpha < math.inf, f"lora_alpha is {alpha}; give a positive number")
    require(
        alpha is None or not all(file.has_alpha for file in files),
        "--lora_alpha has no effect: it is of RTDMD's files that do not say it, and here is none; "
        "leave it out",
    )


def weights_of(path: Path, said: str) -> Path:
    """The .safetensors or .pt file at ``path``, in this folder, or in RTDMD's of a checkpoint."""
    if path.is_dir():
        if (path / "transformer" / PEFT_FILE).is_file():
            return path / "transformer" / PEFT_FILE
        found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt"))
        named = [p for p in found if p.name in (DIFFUSERS_FILE, PEFT_FILE)] or found
        require(
            len(named) == 1,
            f"{said}: it has {len(named)} .safetensors files; name one of them"
            if named
            else f"{said}: there is no .safetensors file in this folder",
        )
        return named[0]
    require(path.is_file(), f"{said}: no such file")
    is_known = path.suffix in (".safetensors", *TORCH)
    require(is_known, f"{said}: it is no .safetensors file, nor .pt; convert it first")
    return path


def lora_sha256(path: Path) -> str:
    """sha256 of a LoRA file, or of it and peft's configuration beside it, where that counts."""
    digest, config = file_sha256(path), path.parent / PEFT_CONFIG
    has_config = is_rtdmds(path) or _is_pefts(read_header(path)[0])
    if not has_config or not config.is_file():
        return digest
    return hashlib.sha256(f"{digest} {file_sha256(config)}".encode()).hexdigest()


def _is_pefts(names: Iterable[str]) -> bool:
    """Whether a file is one of peft's own, which has a configuration beside it."""
    return next(iter(names), "").startswith(PEFT_PREFIX)


def _read_file(lora: LoraFile, denoiser: str, said: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors of a LoRA in float32, by name, and peft's configuration of its networks, or None."""
    path = lora.path
    try:
        if others := not is_rtdmds(path):
            header = read_header(path)[1]
            tensors = {key: value.float() for key, value in read_safetensors(path).items()}
    except ModelError as error:
        raise ModelError(f"{said}{error}") from None
    if not others:
        pairs, config = read_rtdmds(path, lora.alpha, said)
        found = {f"{denoiser}.{key}": value for key, value in pairs.items()}
        return found, {f"{denoiser}.{key}": value for key, value in config.items()}
    if not tensors:
        raise ModelError(f"{said}it holds no tensors")
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ModelError(f"{said}{key} has values that are NaN or infinite")
    if not _is_pefts(tensors):
        text = header.get("lora_adapter_metadata")
        return tensors, None if text is None else json.loads(text)

    if not (path.parent / PEFT_CONFIG).is_file():
        raise ModelError(f"{said}peft's {PEFT_CONFIG} is not beside it; copy it there")
    known = peft_config(path, said)
    names = {key: f"{denoiser}.{key.removeprefix(PEFT_PREFIX)}" for key in tensors}
    found = {names[key]: value for key, value in tensors.items()}
    return found, {f"{denoiser}.{key}": value for key, value in known.items()}


def _shadow(network: nn.Module) -> nn.Module:
    """A copy on the CPU whose weights are zeros that take no memory, for adapters to lie beside."""
    memo = {
        id(p): nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
        for p in network.parameters()
    }
    return copy.deepcopy(network, memo)


def _layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _adapters(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Weights of all adapters, by network and name."""
    return {
        f"{part}.{module}.{name}": value
        for part, network in networks.items()
        for module, layer in _layers(network)
        for name, value in layer.named_parameters()
        if not name.startswith("base_layer.")
    }


def _unused(
    raw: Mapping[str, Tensor],
    converted: Mapping[str, Tensor],
    added: Sequence[Tensor],
    told: Sequence[str],
) -> str | None:
    """First key of a file whose tensor did not reach an adapter; None if all did.

    Args:
        raw: The file's tensors.
        converted: The same as diffusers names them; some formats are also cut and joined.
        added: Weights of the adapters that were made of them.
        told: Warnings.
    """
    wanted = {key: value for key, value in raw.items() if value.numel() > 1}
    have, made = (Counter(map(_content, v)) for v in (added, converted.values()))
    gone = made - have
    lost = Counter(map(_content, wanted.values()))
    if not made - lost:  # they were only renamed
        gone += lost - made
    for named in (wanted, converted):
        if key := next((k for k, value in named.items() if _content(value) in gone), None):
            return key
    return next((key for key in wanted if any(key in message for message in told)), None)


def _scales(raw: Mapping[str, Tensor], said: str) -> dict[object, float]:
    """Alpha / rank by the content of A and B, of the modules that have an alpha in the file."""
    found = dict[object, float]()
    for key, alpha in raw.items():
        module = key.removesuffix(".alpha")
        down, up = (raw.get(f"{module}.lora_{kind}.weight") for kind in ("down", "up"))
        if module == key or down is None or up is None:
            continue
        scale = alpha.item() / len(down)
        if found.setdefault((_content(down), _content(up)), scale) != scale:
            raise ModelError(f"{said}{key} differs from that of another module of equal weights")
    return found


def _content(value: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(value.shape), hashlib.sha256(value.detach().contiguous().numpy().data).digest()


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What diffusers and transformers warn of, which is not shown."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's
            yield told
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)

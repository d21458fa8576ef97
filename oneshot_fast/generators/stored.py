"""The networks of a pipeline of diffusers, and the files that they come from and go to."""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.adapters import (
    active_adapters,
    base_weights,
    stack_adapters,
    write_adapter,
)  # fmt: skip
from oneshot_fast.generators.base import Conditioning, Generator, LoadOptions
from oneshot_fast.generators.lora_files import (
    Adapter,
    Adapters,
    LoraFile,
    MergedSource,
    weights_of,
)  # fmt: skip
from oneshot_fast.generators.original_layout import check_writable, write_single_file
from oneshot_fast.generators.pretrained import PipelineFolder, open_folder, write_use
from oneshot_fast.generators.single_file import PipelineFile
from oneshot_fast.runtime.files import write_folder
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

Source: TypeAlias = PipelineFolder | PipelineFile | MergedSource


class StoredPipeline(Generator):
    """A pipeline's networks; each is saved in the type of its files.

    Attributes:
        pipe: The pipeline.
        start: Timestep at which its one step begins; None: at the noisiest.
        embedded_guidance: What it is told, if it is told of guidance; None: its pipeline's default.
    """

    pipeline: type[Any]  # diffusers' class
    parts: tuple[str, ...]  # its networks: denoiser, VAE, text encoders
    optional: tuple[str, ...] = ()  # those that it may lack
    save_dtype: torch.dtype | None = None
    pipe: Any
    start: float | None
    embedded_guidance: float | None = None
    _sources: dict[str, tuple[Source, torch.dtype]]  # of each network, and the type it was read in

    @classmethod
    def check(cls, pipe: Any) -> None:
        """Raise ModelError unless ``pipe`` is of this family."""
        if not isinstance(pipe, cls.pipeline):
            raise ModelError(f"it is a {type(pipe).__name__}, not a {cls.pipeline.__name__}")
        needed = {*cls.parts, "tokenizer", "scheduler"} - {*cls.optional}
        missing = sorted(name for name in needed if getattr(pipe, name, None) is None)
        if missing:
            raise ModelError(f"the pipeline has no {', '.join(missing)}")

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.parts[0])

    def replace_module(self, module: nn.Module) -> None:
        setattr(self.pipe, self.parts[0], module)

    @property
    def networks(self) -> dict[str, nn.Module]:
        found = {name: getattr(self.pipe, name) for name in self.parts}
        return {name: network for name, network in found.items() if network is not None}

    @abstractmethod
    def _encode_prompt(self, prompt: str) -> Conditioning:
        """Conditioning of one prompt, on the CPU."""

    def save(self, folder: Path) -> None:
        """As a complete diffusers pipeline (safetensors), each network in the type of its files."""
        # Tokenizers save how they were called last: a call makes equal files of equal models.
        self._encode_prompt("")
        whole = copy.copy(self.pipe)
        for name, network in self._as_stored(*[*self.networks][1:]).items():
            setattr(whole, name, network)
        part, denoiser = self.parts[0], self.denoiser
        dtype = self.save_dtype
        if dtype is None and part in self._sources:
            dtype = self._sources[part][0].stored[part]
        if dtype not in (None, denoiser.dtype):
            rounded: dict[int, Tensor] = {
                id(p): nn.Parameter(p.detach().to("cpu", dtype)) for p in denoiser.parameters()
            }
            buffers = (value for value in denoiser.buffers() if value.is_floating_point())
            rounded |= {id(value): value.to("cpu", dtype) for value in buffers}
            setattr(whole, part, copy.deepcopy(denoiser, rounded))
        with write_folder(folder) as temporary:
            whole.save_pretrained(temporary, safe_serialization=True)
            use = {"timestep": self.start, "embedded_guidance": self.embedded_guidance}
            write_use(temporary, {k: v for k, v in use.items() if v is not None})

    def check_single_file(self) -> None:
        if self.layout is None:
            super().check_single_file()
        else:
            try:
                check_writable(self.networks, self.layout)
            except ModelError as error:
                raise ModelError(f"{error}; leave --save_single_file out") from None

    def save_single_file(self, folder: Path) -> None:
        self.check_single_file()
        assert self.layout is not None
        source = open_folder(type(self), str(folder.absolute()), LoadOptions())
        parts = [part for part in self.layout.prefixes if part in source.stored]
        path = folder.with_name(f"{folder.name}.safetensors")
        networks = {part: source.network(part, None) for part in parts}
        write_single_file(networks, path, self.layout, self.pipe.scheduler)
        if parts == [self.parts[0]] and is_main():
            say(f"{path}: the {parts[0]} alone; read it with --model_config {folder}")

    def load_weights(self, folder: Path) -> None:
        part, denoiser = self.parts[0], self.denoiser
        source = open_folder(type(self), str(folder.absolute()), LoadOptions())
        if active_adapters(denoiser):  # ``stack``'s
            denoiser.unload_lora()
        denoiser.load_state_dict(source.network(part, torch.float32).state_dict())
        self._sources[part] = source, denoiser.dtype

    def originals(self) -> dict[str, Tensor]:
        (network,) = self._as_stored(self.parts[0]).values()
        weights = base_weights(network.named_parameters())
        return {name: p.detach().cpu() for name, p in weights.items()}

    def _as_stored(self, *names: str) -> dict[str, nn.Module]:
        """Networks as their files have them, where those in memory are these, rounded or widened.

        A network that was changed since, or has no files, is the one in memory.
        """
        memory = self.networks
        found = {name: memory[name] for name in names}
        for name in self._sources.keys() & found.keys():
            source, loaded = self._sources[name]
            if {p.dtype for p in memory[name].parameters()} | {loaded} == {source.stored[name]}:
                continue
            others = {key: network for key, network in memory.items() if key != name}
            try:
                original = getattr(source.read(None, **others), name)
            except ModelError as error:  # a training is not lost for it
                say(f"warning: {name} stays as it was cast: {error}")
                continue
            if _is_rounded(original, loaded, memory[name]):
                found[name] = original
        return found

    def save_adapter(
        self, weights: Mapping[str, Tensor], folder: Path, kohya: bool = False
    ) -> None:
        layers = ((key, getattr(v, "scaling", None)) for key, v in self.denoiser.named_modules())
        scales = {k: v["default"] for k, v in layers if isinstance(v, dict) and "default" in v}
        write_adapter(self.parts[0], weights, scales, folder, self._kohya_name if kohya else None)

    def read_adapter(self, path: Path) -> Adapter:
        file = weights_of(path, f"--lora_from {path}")
        return Adapters(self.pipe, self.parts, [file], "--lora_from").trainable(self.parts[0])

    def stack(self, loras: Sequence[LoraFile]) -> None:
        read = [Adapters(self.pipe, self.parts, [lora], "--lora") for lora in loras]
        adapters = [one.trainable(self.parts[0]) for one in read]
        weights = [lora.weight for lora in loras]
        stack_adapters(self.denoiser, [*zip(adapters, weights, strict=True)])
        self.lora = tuple(loras)

    def _kohya_name(self, module: str) -> str:
        """Name of one of the denoiser's modules in kohya's format; that of diffusers, mostly."""
        return module


def _is_rounded(original: nn.Module, loaded: torch.dtype, network: nn.Module) -> bool:
    """Whether ``network`` has the weights of ``original``, loaded in a type, and cast since."""
    weights = original.state_dict()
    return all(
        torch.equal(weights[name].to(loaded).to(value.dtype), value.cpu())
        for name, value in base_weights(network.state_dict().items()).items()
    )

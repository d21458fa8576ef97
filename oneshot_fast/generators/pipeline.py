"""What all generators over a pipeline of diffusers share; a family adds its conditioning."""

import contextlib
import copy
import functools
import hashlib
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils import logging
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, require
from oneshot_fast.generators.base import Conditioning, LoadOptions, Prediction, Recomputed
from oneshot_fast.generators.cache import EncodingCache
from oneshot_fast.generators.decoder import (
    Decoder,
    computing,
    latent_affine,
    load_tiny_decoder,
    update_digest,
)  # fmt: skip
from oneshot_fast.generators.known import DISTILLED, is_base, known_start
from oneshot_fast.generators.lora_files import MergedSource
from oneshot_fast.generators.precision import gradient_scale, scale_gradient, widened
from oneshot_fast.generators.pretrained import PipelineFolder, open_folder
from oneshot_fast.generators.single_file import PipelineFile
from oneshot_fast.generators.step import Sampler, Step, single_step
from oneshot_fast.generators.stored import StoredPipeline
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

_PROMPT_BYTES = 4 << 30  # of encodings in memory, where their encoders are moved away


class PipelineGenerator(StoredPipeline):
    """A pipeline's networks and its single step; they run in the type of their weights."""

    is_flow: bool = False  # its step can only be x0 = eps - output
    upcasts_vae: bool = False  # force_upcast of the VAE's config counts, as in its pipeline
    # up to so many steps it decodes the scheduler's estimate, not where the last one ends
    by_estimate: float = 0
    prompts_kept = 4096  # encodings in memory
    takes_lora = True
    guidance_from = 0.0  # added to its pipeline's guidance_scale in off + scale (on - off)

    def __init__(
        self,
        pipe: Any,
        autocast: torch.dtype | None = None,
        start: float | None = None,
        several_steps: bool = False,
    ) -> None:
        """Wrap ``pipe``; its modules keep their device and dtype.

        With ``autocast`` it computes in this type over float32 master weights. Its step begins at
        the timestep ``start``, by default at the noisiest; with ``several_steps`` there may be
        no such step.

        Raises:
            ModelError: If the pipeline is not a one-step generator of this family.
        """
        self.check(pipe)
        self.pipe = pipe
        self.autocast = vae_autocast = autocast
        overflows = self.upcasts_vae and getattr(pipe.vae.config, "force_upcast", False)
        if overflows:
            if pipe.vae.dtype == torch.float16:
                pipe.vae.to(torch.float32)
            if autocast == torch.float16:
                vae_autocast = None
        self.start = None if start is None else float(start)
        if not several_steps:
            self.step  # noqa: B018 (refuses what it cannot take)
        for network in self.networks.values():
            network.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        self._vae_autocast = vae_autocast
        self.decoder = Decoder(pipe.vae, vae_autocast, overflows)
        self._cache: EncodingCache | None = None
        self._encoders: dict[tuple[str, ...], str] = {}
        self._sources = {}
        self._compiled: Callable[..., Any] | None = None
        self.prompt_tokens = self._tokens_read()
        self._forget()

    def _forget(self) -> None:
        """Drop the tensors that were made of the networks."""
        self._prompts: OrderedDict[str, Conditioning] = OrderedDict()
        self._constants: dict[object, Tensor] = {}
        self._blank: Conditioning | None = None  # what guidance leads away from

    @classmethod
    def load(cls, model_id: str, options: LoadOptions) -> "PipelineGenerator":
        """Load a folder in diffusers layout, a hub id, a .safetensors file, or a packaged one."""
        usual = torch.bfloat16 if options.device.type != "cpu" else torch.float32
        dtype = options.dtype or usual
        names = [model_id, *(str(lora.path) for lora in options.lora)]
        weights = torch.float32 if options.master_weights else dtype
        try:
            source: PipelineFolder | PipelineFile
            if model_id.endswith(".safetensors"):
                source = PipelineFile(cls, Path(model_id), options)
            else:
                source = open_folder(cls, model_id, options)
            files: PipelineFolder | PipelineFile | MergedSource = source
            if options.lora:
                files = MergedSource(source, cls.parts, options.lora)
            pipe = files.read(weights)
            cls.adapt(pipe, source)
            start = options.timestep
            start = source.use.get("timestep") if start is None else start
            names += source.names
            of_name = _recognised(names) if start is None else None
            try:
                autocast = None if weights == dtype else dtype
                start = of_name if start is None else start
                generator = cls(pipe, autocast, start, options.several_steps)
            except ModelError as error:
                if of_name is None or "--timestep" not in str(error):
                    raise
                noisiest = pipe.scheduler.config.num_train_timesteps - 1
                raise ModelError(
                    f"by its name {error}; or give --timestep {noisiest} for the noisiest"
                ) from None
        except ModelError as error:
            what = _OF_BASES if is_base(names) and not options.several_steps else ""
            raise ModelError(f"cannot use model {model_id}: {error}{what}") from None
        if is_base(names) and not options.several_steps and is_main():
            say(f"warning: {model_id}, by its name{_OF_BASES}")
        generator._sources = dict.fromkeys(generator.networks, (files, weights))
        generator.lora = options.lora
        if generator.embeds_guidance:
            generator.embedded_guidance = source.use.get("embedded_guidance")
        for network in generator.networks.values():
            network.to(options.device)
        return generator

    @classmethod
    def adapt(cls, pipe: Any, source: PipelineFolder | PipelineFile) -> None:
        """Change ``pipe``, which was read from ``source``, to what the model is meant to be."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "PipelineGenerator":
        """One with weights of its own, not compiled; tokenizers and scheduler are shared."""
        other = copy.copy(self)
        other.pipe = copy.copy(self.pipe)
        networks, other.decoder = copy.deepcopy((self.networks, self.decoder), memo)
        for name, network in networks.items():
            setattr(other.pipe, name, network)
        other._compiled, other.is_compiled = None, False
        other._forget()
        return other

    @functools.cached_property
    def step(self) -> Step:
        """The single step, from ``start``.

        Raises:
            ModelError: If the scheduler has none of this form.
        """
        return self._read_step()

    def _read_step(self) -> Step:
        if self.start is not None and "timesteps" not in self._defaults:
            raise ModelError(f"--timestep {self.start:g}: a {self.pipeline.__name__} takes none")
        scheduler = self.pipe.scheduler
        if not self.is_flow and not hasattr(scheduler, "scale_model_input"):
            raise ModelError(
                f"the scheduler is {type(scheduler).__name__}, which a {self.pipeline.__name__} "
                "does not take; name another one, such as EulerDiscreteScheduler, in "
                "model_index.json"
            )
        step = single_step(scheduler, self.start, by_estimate=self.by_estimate >= 1)
        if self.is_flow and max(abs(v - 1) for v in (step.scale, step.keep, -step.change)) > 1e-6:
            raise ModelError(
                f"the scheduler is {type(scheduler).__name__}, whose single step is not that of a "
                "flow; name another one, such as FlowMatchEulerDiscreteScheduler, in "
                "model_index.json"
            )
        return step

    @staticmethod
    def _sigmas(count: int) -> list[float] | None:
        """Noise levels of ``count`` steps that the pipeline tells its scheduler; None: it asks."""
        return None

    def _schedule(self, count: int, shape: Sequence[int]) -> dict[str, Any]:
        """What the pipeline tells its scheduler for ``count`` steps of latents [C, h, w]."""
        sigmas = self._sigmas(count)
        levels = {"num_inference_steps": count} if sigmas is None else {"sigmas": sigmas}
        return {**levels, **self._shift(shape)}

    def _schedule_at(self, starts: Sequence[float], shape: Sequence[int]) -> dict[str, Any]:
        """What tells its scheduler where the steps begin, of a flow before it shifts them."""
        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return {"timesteps": [int(t) for t in starts]}
        most = scheduler.config.num_train_timesteps
        return {"sigmas": [t / most for t in starts], **self._shift(shape)}

    def _set(
        self, scheduler: Any, count: int, schedule: Mapping[str, Any], eta: float = 0.0
    ) -> Sampler:
        """The steps of a scheduler as the pipeline takes them; arguments are ``Sampler``'s."""
        by_estimate = count <= self.by_estimate
        return Sampler(scheduler, count, schedule, by_estimate=by_estimate, eta=eta)

    @property
    def last_timestep(self) -> float:
        """The largest that a step may begin at."""
        return self.pipe.scheduler.config.num_train_timesteps

    def _shift(self, shape: Sequence[int]) -> dict[str, float]:
        """What a scheduler that shifts by the image's size is told of it."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        ends = (config[f"{name}_image_seq_len"] for name in ("base", "max"))
        tokens = math.prod(shape[1:]) // self.patch**2
        return {"mu": calculate_shift(tokens, *ends, config.base_shift, config.max_shift)}

    @property
    def _defaults(self) -> dict[str, Any]:
        """What a call of the pipeline takes, and its defaults."""
        return {k: p.default for k, p in signature(self.pipeline.__call__).parameters.items()}

    @property
    def image_size(self) -> int:
        native = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.sample_size
        return native * self.latent_factor

    @property
    def latent_factor(self) -> int:
        return self.pipe.vae_scale_factor

    def compile(self, mode: str = "default") -> None:
        """Compile the denoiser where it is differentiated; see torch.compile.

        Code is compiled at the first use with a batch size, and kept on disk by torch. Under
        no_grad nothing is compiled: that is one evaluation in many, of other batch sizes. The
        decoder stays as it is: torch 2.13's inductor fuses the backward pass of two of its blocks
        in channels_last order, which it chooses itself on the CPU, to a gradient of 0.

        Args:
            mode: "default", "max-autotune", or "reduce-overhead" for CUDA graphs.
        """
        self._compiled = torch.compile(self.denoiser, mode=mode, dynamic=False)
        self.is_compiled = True

    @property
    def patch(self) -> int:
        """Side in latent pixels of what the denoiser sees as one."""
        return 1

    @property
    def tokenizer(self) -> str:
        """What tells how long a prompt is."""
        return "tokenizer"

    @property
    def size_multiple(self) -> int:
        return self.latent_factor * self.patch

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor, of = self.latent_factor, self.size_multiple
        fits = height > 0 and width > 0 and height % of == width % of == 0
        require(fits, f"a size of {width} x {height} pixels is not in multiples of {of}")
        return self.pipe.vae.config.latent_channels, height // factor, width // factor

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """As the pipeline does, each distinct one once and by itself."""
        rows = []
        for prompt in prompts:
            if prompt not in self._prompts:
                self._prompts[prompt] = self._cached_prompt(prompt)
            self._prompts.move_to_end(prompt)
            rows.append(self._prompts[prompt])
        while len(self._prompts) > max(self.prompts_kept, len(prompts)):
            self._prompts.popitem(last=False)
        return Conditioning.cat(rows).to(self.device)

    @contextlib.contextmanager
    def kept_prompts(self, prompts: Collection[str], folder: Path) -> Iterator[None]:
        """In memory where they have room there, else in the cache, which ``folder`` is for then."""
        first = [*islice(prompts, 1)]
        each = sum(row.nbytes for row in self.encode_prompts(first).tensors().values())
        most, own = max(1, _PROMPT_BYTES // max(1, each)), self._cache is None
        if len(prompts) <= most:
            self.prompts_kept = max(self.prompts_kept, len(prompts))
        else:
            self.prompts_kept = min(self.prompts_kept, most)
            self._prompts.clear()  # what is in memory alone would be forgotten
            self._cache = self._cache or EncodingCache(folder)
        try:
            for prompt in prompts:
                self.encode_prompts([prompt])
            yield
        finally:
            if own:
                self._cache = None

    def _cached_prompt(self, prompt: str) -> Conditioning:
        if self._cache is None:
            return self._encode_prompt(prompt)
        encoders = [*self.networks][2:]
        names = [name.replace("text_encoder", "tokenizer") for name in encoders]
        tokens = [getattr(self.pipe, name)(prompt, verbose=False).input_ids for name in names]
        key = ("prompt", self._encoder_key(*encoders), tokens, self.prompt_tokens)
        return Conditioning(**self._cache.get(key, lambda: self._encode_prompt(prompt).tensors()))

    @torch.no_grad()
    def _told_by_pipeline(self, prompt: str, **how: Any) -> tuple[Any, ...]:
        """What the pipeline's ``encode_prompt`` gives, tensors on the CPU."""
        logger = logging.get_logger(type(self.pipe).__module__)
        level = logger.level
        logger.setLevel("ERROR")  # truncation is reported once, through is_truncated
        try:
            device = next([*self.networks.values()][2].parameters()).device
            found = self.pipe.encode_prompt(prompt, device=device, **how)
        finally:
            logger.setLevel(level)
        return tuple(value.cpu() if isinstance(value, Tensor) else value for value in found)

    def _encode_blank(self) -> Conditioning:
        """That of no prompt, which classifier-free guidance leads away from, on the CPU."""
        return self._encode_prompt("")

    @abstractmethod
    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        """What the denoiser, of a ``dtype``, takes besides input and timestep.

        The noises [B, C, h, w] tell size and device, the conditioning is of B prompts.
        """

    def _evaluate(
        self, run: Callable[..., Any], x: Tensor, timestep: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Output [B, C, h, w] of the denoiser, or what was compiled of it, ``run``.

        Its input is ``x`` [B, C, h, w] and the 0-dimensional timestep; the arguments are those of
        ``_arguments``.
        """
        return run(x, timestep, **arguments, return_dict=False)[0]

    def _tokens_read(self) -> int:
        """Tokens of a prompt that the model reads."""
        most = self._defaults.get("max_sequence_length")
        return most or getattr(self.pipe, self.tokenizer).model_max_length

    def is_truncated(self, prompt: str) -> bool:
        tokens = getattr(self.pipe, self.tokenizer)(prompt, verbose=False).input_ids
        return len(tokens) > self.prompt_tokens

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """The mean of the VAE's posterior, scaled as the denoiser expects."""
        vae = self.pipe.vae
        x = (image[None] * 2 - 1).to(vae.device, next(vae.encoder.parameters()).dtype)
        with computing(vae.device, self._vae_autocast):
            found = vae.encode(x, return_dict=False)[0]
        latent = widened(found if isinstance(found, Tensor) else found.mode())[0]
        shift, scale = latent_affine(vae, latent)
        return (latent - shift) / scale

    def cached_latent(
        self, read: Callable[[], Tensor], key: Callable[[], Sequence[object]]
    ) -> Tensor:
        if self._cache is None:
            return super().cached_latent(read, key)
        name = ("latent", self._encoder_key(self.parts[1]), *key())
        return self._cache.get(name, lambda: {"latent": self.encode_image(read())})["latent"]

    def use_cache(self, folder: Path) -> None:
        self._cache = EncodingCache(folder)

    def _encoder_key(self, *names: str) -> str:
        """Text that differs where one of these networks, or how it computes, does; made once."""
        if names not in self._encoders:
            digest = hashlib.sha256(str(self.autocast).encode())
            for name in names:
                network = self.networks[name]
                first = next(network.parameters())
                digest.update(f"{first.dtype} {first.device.type}".encode())
                update_digest(digest, name, network)
            self._encoders[names] = digest.hexdigest()
        return self._encoders[names]

    def decode_raw(self, latents: Tensor) -> Tensor:
        return self.decoder.raw(latents)

    def predict(self, eps: Tensor, conditioning: Conditioning) -> Prediction:
        step = self.step
        timestep = self._constant(("timestep", eps.device), lambda: step.timestep.to(eps.device))
        output = self._denoise(eps * step.scale, timestep, conditioning)
        return Prediction(output, eps * step.keep, -step.change)

    def _denoise(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output [B, C, h, w] float32 for its input, like it, and a timestep."""
        run, dtype = self.denoiser, next(self.denoiser.parameters()).dtype
        if self._compiled is not None and torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()
            run = self._compiled
        arguments = self._arguments(x, conditioning, dtype)
        s = self._gradient_scale(dtype, x[0].numel())
        with computing(x.device, self.autocast):
            output = self._evaluate(run, scale_gradient(x, 1 / s).to(dtype), timestep, arguments)
        return scale_gradient(widened(output), s)

    def _constant(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, made once: each copy to a GPU makes it wait."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def _gradient_scale(self, dtype: torch.dtype, elements: int) -> float:
        """Scale of the gradients inside the denoiser; 1 where it is trained, which has its own."""
        scale = gradient_scale(self.autocast or dtype, elements)
        is_trained = scale != 1 and any(p.requires_grad for p in self.denoiser.parameters())
        return 1.0 if is_trained else scale

    def recompute(self, level: Recomputed) -> None:
        super().recompute(level)
        if level != "none" and self.decoder.can_checkpoint:
            self.decoder.checkpoint()

    def tune_decoder(
        self, tiny: str | None, dtype: torch.dtype | None, checkpointing: bool, tile: int
    ) -> None:
        if tiny is not None:
            channels, dtype = self.pipe.vae.config.latent_channels, dtype or self.decoder.dtype
            self.decoder = load_tiny_decoder(tiny, self.device, dtype, channels)
        elif dtype is not None:
            self.decoder.set_dtype(dtype)
        if checkpointing:
            self.decoder.checkpoint()
        if tile:
            self.decoder.tile(tile)

    def encoders(self, keep_decoder: bool) -> dict[str, list[nn.Module]]:
        """With the whole VAE unless ``keep_decoder``."""
        parts = {name: [network] for name, network in [*self.networks.items()][1:]}
        if keep_decoder:
            vae = self.pipe.vae
            names = ("encoder", "quant_conv")
            parts[self.parts[1]] = [m for name in names if (m := getattr(vae, name, None))]
        return parts

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser is told of guidance, and so needs one evaluation for it."""
        return False

    @property
    def takes_cfg(self) -> bool:
        """Whether the pipeline does classifier-free guidance."""
        return not self.embeds_guidance or "true_cfg_scale" in self._defaults

    def _guidance(self, eps: Tensor, told: Conditioning) -> Tensor:
        """What a denoiser that embeds its guidance is told for each noise, [B]."""
        if told.guidance is not None:
            return told.guidance
        scale = self.embedded_guidance
        scale = self._defaults["guidance_scale"] if scale is None else scale
        key = ("guidance", scale, eps.device)
        return self._constant(key, lambda: torch.tensor([scale]).to(eps.device)).expand(len(eps))

    def _step_text(self) -> str:
        """What differs where the single step does."""
        return str(self.step)

    def fingerprint(self) -> str:
        """16 hex digits that change when any module or its precision changes.

        Hashes name, shape and up to 2047 evenly spaced values of every tensor in float32.
        """
        # the step's name when run folders first kept its hash
        digest = hashlib.sha256(f"One{self._step_text()}".encode())
        for name, network in self.networks.items():
            update_digest(digest, name, network)
        digest.update(self.decoder.fingerprint().encode())
        if self.embedded_guidance is not None:
            digest.update(repr(self.embedded_guidance).encode())
        precision = self.autocast or self.denoiser.dtype, self.decoder.computes_in
        if set(precision) != {torch.float32}:
            digest.update(repr(precision).encode())
        return digest.hexdigest()[:16]


class TransformerGenerator(PipelineGenerator):
    """What the families with a transformer share."""

    prompts_kept = 512  # FLUX's take 4 MB each in bfloat16

    @property
    def patch(self) -> int:
        return self.denoiser.config.patch_size

    def _evaluate(
        self, run: Callable[..., Any], x: Tensor, timestep: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        return run(x, timestep=timestep.expand(len(x)), **arguments, return_dict=False)[0]


_OF_BASES = f"; a base model makes nothing in one step, a distilled one does, such as {DISTILLED}"


def _recognised(names: Sequence[str]) -> float | None:
    """Timestep at which the step of a model that is known by one of its names begins."""
    for name in names:
        start = known_start([name])
        if start is not None:
            if is_main():
                say(f"{name}: its one step begins at timestep {start:g}, by its name (--timestep)")
            return start
    return None

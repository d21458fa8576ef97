"""What the commands share: option groups, argument parsing, exit codes, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
from safetensors import SafetensorError

from oneshot_fast.errors import UserError

if TYPE_CHECKING:
    from oneshot_fast.data.pairs import Failure, Record
    from oneshot_fast.data.sources import Source
    from oneshot_fast.generators.sdxl import OneStepGenerator

OK, SOME_FAILED, BAD_INPUT, NO_SPACE, INTERRUPTED = 0, 1, 2, 3, 130
Options = TypeVar("Options")


@dataclass(frozen=True)
class ModelOptions:
    """How the generator is loaded, and where it runs."""

    variant: str | None = None
    """Weight variant, such as fp16; plain weights serve where the model has none."""
    revision: str | None = None
    """Hub revision."""
    model_config: str | None = None
    """Folder or hub id with the pipeline's configs; only for a .safetensors file."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; by default cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the UNet computes in; auto is float32 on the CPU, bfloat16 on a GPU. Noise, rotation
    and losses are float32."""
    channels_last: bool = False
    """Keep weights in channels_last order, which suits convolutions in half precision on a GPU."""
    compile: bool = False
    """Compile the UNet (torch.compile), once per batch size; the first start takes minutes, later
    ones read torch's cache on disk."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """For --compile; reduce-overhead replays CUDA graphs, which helps small batches."""
    decoder_id: str | None = None
    """Tiny decoder (AutoencoderTiny: folder or hub id) that takes the VAE's place wherever latents
    are decoded: the pixel loss, and images shown."""
    decoder_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the decoder computes in; auto is the UNet's, but float32 for a VAE that overflows."""
    decoder_checkpointing: bool = False
    """Pixel loss: recompute the decoder's activations in the backward pass, for less memory."""
    decoder_tiling: int = 0
    """Pixel loss: decode in overlapping tiles of so many latent pixels (32, say); 0: as a whole."""
    cache_dir: Path | None = None
    """Folder that keeps encoded prompts and target images (safetensors, named by content) for other
    runs and commands too; by default each run encodes them anew."""

    def load(self, model_id: str, master_weights: bool = False) -> OneStepGenerator:
        """Load a generator.

        Args:
            model_id: Folder in diffusers layout, hub id, .safetensors file, or "tiny".
            master_weights: Keep float32 weights and compute in ``dtype`` through autocast.
        """
        import diffusers
        import torch
        import transformers

        from oneshot_fast.generators.loading import load_generator

        if self.compile_mode != "default" and not self.compile:
            raise UserError("--compile_mode is for --compile; give both")
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        generator = load_generator(
            model_id,
            device=self.device,
            dtype=None if self.dtype == "auto" else getattr(torch, self.dtype),
            master_weights=master_weights,
            variant=self.variant,
            revision=self.revision,
            model_config=self.model_config,
        )
        self._tune(generator)
        return generator

    def _tune(self, generator: OneStepGenerator) -> None:
        """Set decoder, memory order and compilation."""
        import torch

        from oneshot_fast.generators.cache import EncodingCache
        from oneshot_fast.generators.loading import load_tiny_decoder

        auto = self.decoder_dtype == "auto"
        touched = self.decoder_id or not auto or self.decoder_checkpointing or self.decoder_tiling
        if touched and generator.decoder is None:
            raise UserError("this model has no decoder; leave the decoder's options out")
        if self.decoder_id is not None:
            dtype = generator.decoder.dtype if auto else getattr(torch, self.decoder_dtype)
            channels = generator.latent_shape(8, 8)[0]
            generator.decoder = load_tiny_decoder(
                self.decoder_id, generator.device, dtype, channels
            )
        elif not auto:
            generator.decoder.set_dtype(getattr(torch, self.decoder_dtype))
        if self.decoder_checkpointing:
            generator.decoder.checkpoint()
        if self.decoder_tiling:
            generator.decoder.tile(self.decoder_tiling)
        if self.cache_dir is not None:
            if generator.decoder is None:
                raise UserError("this model encodes nothing; leave --cache_dir out")
            generator.encodings = EncodingCache(self.cache_dir, generator)
        if self.channels_last:
            generator.use_channels_last()
        if self.compile:
            generator.compile(self.compile_mode)


@dataclass(frozen=True)
class DataOptions:
    """Which pairs, and how their images are read."""

    data_root: str | None = None
    """Folder with pairs.jsonl ({"prompt", "image"}), metadata.jsonl (file_name, text), WebDataset
    *.tar or *.parquet; or one such file, or a pattern of shards with * or {000..123}, also a URL
    such as hf://datasets/user/name/*.parquet or s3://bucket/{000..123}.tar."""
    prompt_field: str | None = None
    """Field or column of the prompt; by default prompt (text in metadata.jsonl), in shards the
    first of prompt, text and caption, and in tar shards before these the .txt member."""
    image_field: str | None = None
    """Field or column of the image; by default image (file_name in metadata.jsonl; in tar shards
    the extension jpg, jpeg, png or webp)."""
    start_index: int = 0
    """Records to skip at the start."""
    max_samples: int | None = None
    """Records to use at most."""
    allow_outside_root: bool = False
    """Accept image paths that leave the data folder."""
    resolution: int | None = None
    """Image side in pixels; by default the model's own (512 for SDXL-Turbo)."""
    resize_mode: Literal["crop", "squash"] = "crop"
    """Other aspect ratios: cut the centre square, or squash to a square."""

    def open(self, data_root: str | Path) -> Source:
        """The data set in ``data_root`` as a stream, read as these options say."""
        from oneshot_fast.data.sources import open_source

        return open_source(
            data_root,
            prompt_field=self.prompt_field,
            image_field=self.image_field,
            start_index=self.start_index,
            max_samples=self.max_samples,
            allow_outside_root=self.allow_outside_root,
        )

    def read(self, data_root: str | Path) -> tuple[list[Record], list[Failure]]:
        """All records and failures of the data set in ``data_root``."""
        from oneshot_fast.data.pairs import Failure, Record

        items = list(self.open(data_root))
        records = [item for item in items if isinstance(item, Record)]
        return records, [item for item in items if isinstance(item, Failure)]


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept and shown."""

    seed: int = 0
    """Seed of the run; each sample's own seed follows from it and from the sample's id."""
    overwrite: bool = False
    """Start anew in a folder that holds another run, instead of resuming."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log losses to this tracker."""


def run_command(
    name: str, options: type[Options], command: Callable[[Options], int], argv: Sequence[str] | None
) -> int:
    """Parse ``argv`` into ``options``, run ``command`` and turn its end into an exit code.

    Args:
        name: The command's name, as in ``python -m oneshot_fast.NAME``.
        options: Dataclass whose fields are flags, or groups of flags.
        command: What to run.
        argv: Arguments; None takes the process's own.

    Returns:
        0; 1 if some samples failed; 2 on bad input (one line on stderr); 3 on a full disk; 130
        after Ctrl-C.
    """
    silence_imports()
    again = "everything finished is kept; repeat the command to go on"
    try:
        code = command(_parse(name, options, argv))
        if "oneshot_fast.runtime.processes" in sys.modules:
            sys.modules["oneshot_fast.runtime.processes"].leave()
        return code
    except UserError as error:
        return _fail(BAD_INPUT, str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted: {again}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, SafetensorError) as error:
        number, place = _system_error(error)
        if isinstance(error, SafetensorError) and number is None:
            return _fail(BAD_INPUT, f"damaged safetensors file: {error}; restore it")
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(NO_SPACE, f"no space left to write{place}: free some; {again}")
        return _fail(BAD_INPUT, f"{os.strerror(number)}{place}; check the path and its permissions")


def silence_imports() -> None:
    """Keep diffusers and transformers from warning when they are imported.

    Without it each command starts with, say, that torchvision, which we do not use, is missing.
    """
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _fail(code: int, message: str) -> int:
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    return code


def _system_error(error: OSError | SafetensorError) -> tuple[int | None, str]:
    """Error number and place; safetensors names the number only in its message."""
    if isinstance(error, OSError):
        return error.errno, f" ({error.filename})" if error.filename else ""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None, ""


def _parse(name: str, options: type[Options], argv: Sequence[str] | None) -> Options:
    """Options of the command line.

    Raises:
        UserError: With the one line that matters of the box that tyro draws.
    """
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            return tyro.cli(
                options,
                prog=f"python -m oneshot_fast.{name}",
                description=inspect.cleandoc(options.__doc__ or ""),
                args=argv,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if not end.code:
            raise
        rows = [line.strip("│─- ") and line.strip("│ ") for line in drawn.getvalue().splitlines()]
        below_title = itertools.dropwhile(lambda row: not row, rows[1:])
        said = " ".join(itertools.takewhile(bool, below_title)).removeprefix("Error parsing ")
        said = said or "these arguments make no sense"
        raise UserError(f"{said} (python -m oneshot_fast.{name} --help)") from None


def public(options: Any) -> dict[str, Any]:
    """Options as one flat dict of JSON values, flag by flag."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            flat |= public(value)
        else:
            flat[field.name] = str(value) if isinstance(value, Path) else value
    return flat

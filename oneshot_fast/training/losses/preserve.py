"""Against drift: what the generator makes of random noises stays what it was before training.

    L = w_latent mean (x0 - x0_base)^2 + w_pixel mean |decoder(x0) - decoder(x0_base)|

Distillation from the model's own past, as in Learning without Forgetting (Li and Hoiem 2016, arXiv
1606.09282).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oneshot_fast.data.sizes import Size
from oneshot_fast.generators.base import Generator
from oneshot_fast.runtime.files import read_metadata, read_safetensors, write_safetensors
from oneshot_fast.runtime.processes import is_main, map_over_processes
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.training.batch import Rows
from oneshot_fast.training.losses.matching import Matching
from oneshot_fast.training.options import TrainOptions

POOL = "preserve.safetensors"  # its file
_ROWS = 16  # of the pool, computed at once


@dataclass(frozen=True)
class Preserve(Matching):
    """``Matching``, where the targets are the base generator's latents and their images."""

    def images(self, generator: Generator, rows: Rows) -> Tensor:
        """The decoder is not trained."""
        return generator.decode(rows.extra["latents"])


@dataclass(frozen=True)
class PreservePool:
    """Random noises and what the base generator makes of them, computed once.

    Attributes:
        prompts: M prompts.
        seeds: M seeds of the noises.
        latents: Base latents, [M, C, h, w] float32, on the CPU.
        noise_shape: [C, h, w] of a noise.
    """

    prompts: list[str]
    seeds: list[int]
    latents: Tensor
    noise_shape: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def build(
        cls, generator: Generator, options: TrainOptions, prompts: Sequence[str], size: Size,
        seed: int, folder: Path,
    ) -> "PreservePool | None":  # fmt: skip
        """Read the pool from ``folder``, or compute it with the generator as it is now.

        Each process computes its part; the main one writes the file, so that a resumed run has the
        same. None if nothing is to be preserved.
        """
        if not options.preserves:
            return None
        path, count = folder / POOL, options.preserve_pool_size
        shape = generator.noise_shape(*size)
        if path.exists():
            kept, latents = read_metadata(path, "pool"), read_safetensors(path)["latents"]
            return cls(kept["prompts"], kept["seeds"], latents, shape)
        draw = torch.Generator().manual_seed(derived_seed(seed, "preserve prompts"))
        chosen = torch.randint(len(prompts), (count,), generator=draw).tolist()
        pool_prompts = [prompts[k] for k in chosen]
        seeds = [derived_seed(seed, "preserve", k) for k in range(count)]

        def compute(k: int) -> Tensor:
            part = slice(_ROWS * k, _ROWS * (k + 1))
            eps = gaussian(seeds[part], shape).to(generator.device)
            return generator.latents(eps, generator.told(pool_prompts[part], seeds[part])).cpu()

        made = torch.cat([*map_over_processes(compute, range(math.ceil(count / _ROWS)))])
        if is_main():
            kept = {"prompts": pool_prompts, "seeds": seeds}
            write_safetensors(path, {"latents": made}, {"pool": kept})
        return cls(pool_prompts, seeds, made, shape)

    def rows(self, generator: Generator, count: int, seed: int) -> Rows:
        """``count`` different noises for ``Preserve``, or all if there are fewer, on its device."""
        draw = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.seeds), generator=draw)[:count].tolist()
        seeds = [self.seeds[k] for k in drawn]
        noise = gaussian(seeds, self.noise_shape)
        prompts = generator.told([self.prompts[k] for k in drawn], seeds)
        extra = {"latents": self.latents[drawn].to(generator.device)}
        return Rows(noise.to(generator.device), prompts, extra)

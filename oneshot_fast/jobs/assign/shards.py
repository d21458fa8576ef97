"""Results of the E-step on the disk: noise shards, manifest, history, images."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oneshot_fast.data.images import save_png
from oneshot_fast.data.pairs import Failure, image_text
from oneshot_fast.jobs.assign.targets import Target, failure
from oneshot_fast.runtime.files import append_jsonl, write_safetensors
from oneshot_fast.runtime.processes import is_main
from oneshot_fast.search.solver import Solved

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oneshot_fast.generators.base import Generator
    from oneshot_fast.generators.target_images import TargetImages


@dataclass(frozen=True)
class Shard:
    """What is kept together; tensors are on the CPU.

    Attributes:
        solved: The targets, all with finite losses.
        z: Their noises, [N, C, h, w] float32.
        q: Their rotations, [N, D, D] or [N, G, G, D, D] float32; None for methods without.
        images: Images [3, H, W] to save, by file name.
    """

    solved: Sequence[Solved[Target]]
    z: Tensor
    q: Tensor | None
    images: dict[str, Tensor]


def shard_path(index: int, suffix: str = "") -> Path:
    """Path, in the run's folder, of the shard whose first sample has this index."""
    return Path("noises") / f"{index:08d}{suffix}.safetensors"


class ShardWriter:
    """Turns what was found into files: first on the device, then, in any thread, on the disk."""

    def __init__(
        self,
        generator: Generator,
        targets: TargetImages,
        folder: Path,
        tracker: Accelerator | None,
        *,
        resize_mode: str,
        num_images: int,
    ) -> None:
        """Bind the run's folder; the clock of history.jsonl starts.

        Args:
            generator: Makes the images before and after.
            targets: Reads the target images.
            folder: The run's.
            tracker: Takes the mean losses; None where only shards are kept.
            resize_mode: "crop" or "squash".
            num_images: TargetImages whose pictures are saved; -1 for all.
        """
        self._generator, self._targets, self._folder = generator, targets, folder
        self._tracker, self._resize_mode, self._num_images = tracker, resize_mode, num_images
        self._since = time.perf_counter()

    def shard(self, found: Sequence[Solved[Target]]) -> tuple[Shard | None, list[Failure]]:
        """What is to be written of ``found``, and the failures: losses that are not finite."""
        good = [s for s in found if all(map(math.isfinite, s.losses))]
        bad = [s.item.record for s in found if s not in good]
        failures = [failure(record, "its loss became NaN or infinite") for record in bad]
        if not good:
            return None, failures
        images: dict[str, Tensor] = {}
        for s in good:
            if self._num_images < 0 or s.item.index < self._num_images:
                images |= self._images(s)
        q = [s.q for s in good if s.q is not None]
        z = torch.stack([s.z for s in good])
        return Shard(good, z, torch.stack(q) if q else None, images), failures

    @torch.no_grad()
    def _images(self, s: Solved[Target]) -> dict[str, Tensor]:
        target = s.item
        image = self._targets.image(target.record.image_path, self._resize_mode)
        images = {f"{target.record.id}-target.png": image}
        for name, noise in (("base", target.eps), ("assigned", s.z.to(target.eps.device))):
            latents = self._generator.latents(noise[None], target.prompt)
            images[f"{target.record.id}-{name}.png"] = self._generator.decode(latents)[0].cpu()
        return images

    def write(self, shard: Shard, done: dict[str, dict[str, Any]]) -> None:
        """Write images, the shard with its rows, and then what is made of them.

        Args:
            shard: What to keep.
            done: All rows by id; the new ones are added.
        """
        rows = self.keep(shard)
        done.update((row["id"], row) for row in rows)
        if is_main():  # the lists are made of all shards in the end
            self.note(rows, len(done))

    def keep(self, shard: Shard) -> list[dict[str, Any]]:
        """Write images, then the shard; returns its rows."""
        noise_path = self._new_path(shard.solved[0].item.index)
        rows = [self._row(s, noise_path, k) for k, s in enumerate(shard.solved)]
        for name, image in shard.images.items():
            save_png(self._folder / "images" / name, image)
        tensors = {"z": shard.z} if shard.q is None else {"z": shard.z, "q": shard.q}
        write_safetensors(self._folder / noise_path, tensors, {"rows": rows})
        return rows

    def note(self, rows: Sequence[Mapping[str, Any]], count: int) -> None:
        """Append a shard's rows to manifest.jsonl, and their means to history.jsonl.

        Args:
            rows: The new ones.
            count: Rows of all shards so far.
        """
        append_jsonl(self._folder / "manifest.jsonl", rows)
        now = time.perf_counter()
        event = {
            "samples": count,
            "initial_loss": statistics.fmean(row["initial_loss"] for row in rows),
            "best_loss": statistics.fmean(row["best_loss"] for row in rows),
            "seconds": round(now - self._since, 3),
        }
        self._since = now
        append_jsonl(self._folder / "history.jsonl", [event])
        if self._tracker is not None:
            self._tracker.log(event, step=count)

    def _new_path(self, index: int) -> Path:
        """Name by the first sample's index, which can only repeat if a broken shard was mended."""
        for copy in itertools.count():
            suffix = f"-{copy}" if copy else ""
            path = shard_path(index, suffix)
            if not (self._folder / path).exists():
                return path
        raise AssertionError

    def _row(self, s: Solved[Target], noise_path: Path, position: int) -> dict[str, Any]:
        target, record = s.item, s.item.record
        return {
            "id": record.id,
            "index": target.index,
            "prompt": record.prompt,
            "prompt_truncated": target.is_truncated,
            "target_image_path": image_text(record.image_path, self._folder.resolve()),
            "image_sha256": target.image_sha256,
            "resize_mode": self._resize_mode,
            "noise_path": noise_path.as_posix(),
            "noise_index": position,
            "seed": target.seed,
            "initial_loss": s.losses[0] if target.first_loss is None else target.first_loss,
            "best_loss": min(s.losses),
            "best_step": s.best_step,
            "candidates": target.candidates,
            "nfe": target.candidates + 3 * len(s.losses) - 2,
            "losses": s.losses,
        }

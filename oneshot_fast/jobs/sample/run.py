"""Images of prompts, each from a noise of its own, into one folder."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.data.images import save_png, shrink, tile
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.base import Generator
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.concurrency import Interrupts, stop
from oneshot_fast.runtime.files import read_json, read_jsonl, write_json, write_jsonl
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.progress import progress
from oneshot_fast.runtime.seeds import content_id, derived_seed, gaussian

SAMPLES = "samples.jsonl"
_SHOWN = 64  # images of grid.png


class SampleRun:
    """Images that a generator makes of prompts; what is there already is not made again.

    An image is a function of the seed, its prompt's place in the list, and its number among those
    of the prompt; of the batch, only by rounding. ``samples.jsonl`` has a row for each; what became
    NaN or infinite has its row in failures.jsonl, and no picture.
    """

    outputs = ("images", SAMPLES, "failures.jsonl", "grid.png", "summary.json")

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: Path,
        *,
        images_per_prompt: int = 1,
        resolution: Resolution | None = None,
        batch_size: int = 4,
        rewards: WeightedRewards | None = None,
        seed: int = 0,
    ) -> None:
        """Describe the run.

        Args:
            generator: What makes them.
            prompts: N texts.
            folder: Where everything is written.
            images_per_prompt: M, each from another noise.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            batch_size: Images that are made at once.
            rewards: Scores of the images, which the rows have, too.
            seed: Of the noises.

        Raises:
            UserError: If a number makes no sense, or the model does not make this size.
        """
        require(bool(prompts), "there is no prompt")
        require(images_per_prompt >= 1, "images_per_prompt must be at least 1")
        require(batch_size >= 1, "batch_size must be at least 1")
        self.generator, self.folder, self.rewards = generator, Path(folder), rewards
        self.prompts, self.images_per_prompt = list(prompts), images_per_prompt
        self.batch_size, self.seed = batch_size, seed
        self.size = size_of(resolution or generator.image_size)
        self.noise_shape = generator.noise_shape(*self.size)

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "command": "sample",
            "seed": self.seed,
            **self.generator.settings(self.size),
            "samples": len(self.prompts),
            "prompts": content_id(*self.prompts),
            "images_per_prompt": self.images_per_prompt,
            "rewards": sorted(self.rewards.weights) if self.rewards is not None else [],
        }

    def run(self, *, overwrite: bool = False, verify: bool = False) -> dict[str, Any]:
        """Make the images that are not there; returns the summary, as in summary.json.

        Raises:
            UserError: If no image is finite.
        """
        self.generator.warn_of_cut(self.prompts)
        folder = RunFolder(self.folder, self.settings(), self.outputs, overwrite, verify)
        with folder, Interrupts() as interrupts:
            folder.reopen("summary.json")
            path = self.folder / "summary.json"
            if path.exists():
                return dict(read_json(path))
            (self.folder / "images").mkdir(exist_ok=True)
            rows = {row["image"]: row for row in read_jsonl(self.folder / SAMPLES)}
            wanted = [
                (n, k) for n in range(len(self.prompts)) for k in range(self.images_per_prompt)
            ]
            started, failures = time.perf_counter(), list[Failure]()
            with progress(len(wanted), "sample", "image") as bar:
                for start in range(0, len(wanted), self.batch_size):
                    # made whole where one is missing, as a batch of another size rounds otherwise
                    part = wanted[start : start + self.batch_size]
                    if not all(self._is_there(_name(*at), rows) for at in part):
                        made, failed = self._make(part)
                        rows |= {row["image"]: row for row in made}
                        failures += failed
                        names = (_name(*at) for at in wanted)
                        write_jsonl(self.folder / SAMPLES, [rows[n] for n in names if n in rows])
                    bar.update(len(part))
                    if interrupts.pending:
                        stop(interrupts.pending)
            write_jsonl(self.folder / "failures.jsonl", [failure.row for failure in failures])
            if not rows:
                raise UserError(f"no image could be made; the first: {failures[0].reason}")
            self._write_grid([name for name in (_name(*at) for at in wanted) if name in rows])
            summary = {
                "samples": len(rows),
                "means": self._means([*rows.values()]),
                "seconds": round(time.perf_counter() - started, 1),
                "failed": len(failures),
                "settings": self.settings(),
            }
            write_json(path, summary)
            return summary

    def _is_there(self, name: str, rows: dict[str, Any]) -> bool:
        return name in rows and (self.folder / name).is_file()

    @torch.no_grad()
    def _make(
        self, places: Sequence[tuple[int, int]]
    ) -> tuple[list[dict[str, Any]], list[Failure]]:
        """Make and write the images at (prompt, number); rows of samples.jsonl, and failures."""
        prompts = [self.prompts[n] for n, _ in places]
        seeds = [derived_seed(self.seed, "sample", n, k) for n, k in places]
        noise = gaussian(seeds, self.noise_shape).to(self.generator.device)
        latents = self.generator.latents(noise, self.generator.told(prompts, seeds))
        images = self.generator.decode(latents)
        good = [
            i for i, x in enumerate(latents) if x.isfinite().all() and images[i].isfinite().all()
        ]
        scores = dict[str, torch.Tensor]()
        if self.rewards is not None and good:
            scores = self.rewards.scores(images[good], [prompts[i] for i in good])
        rows, failures = [], []
        for i, (place, prompt) in enumerate(zip(places, prompts, strict=True)):
            name, bad = _name(*place), None if i in good else "it"
            values = {} if bad else {k: v[good.index(i)].item() for k, v in scores.items()}
            bad = bad or next((k for k, v in values.items() if not math.isfinite(v)), None)
            if bad is not None:
                reason = f"{bad} became NaN or infinite"
                failures.append(Failure(reason, prompt=prompt, image=name))
                continue
            save_png(self.folder / name, images[i])
            rows.append({"image": name, "prompt": prompt, "seed": seeds[i], **values})
        return rows, failures

    def _write_grid(self, names: Sequence[str]) -> None:
        """The first images, the ones of a prompt side by side."""
        from oneshot_fast.data.images import load_image

        columns = self.images_per_prompt if self.images_per_prompt > 1 else 8
        paths = (self.folder / name for name in names[:_SHOWN])
        images = [load_image(path, *self.size) for path in paths]
        save_png(self.folder / "grid.png", tile(shrink(torch.stack(images), 256), columns))

    @staticmethod
    def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        names = [key for key in rows[0] if key not in ("image", "prompt", "seed")]
        return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _name(prompt: int, number: int) -> str:
    return f"images/{prompt:05d}-{number:02d}.png"

"""Train a generator on given pairs of images, of which one is preferred."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.data.image_refs import ImageRef, file_sha256
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.preferences import PreferredPair, noise_of, noises_by_image
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import DataError, UserError, require
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.levels import Levels
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.prefer.options import PreferOptions
from oneshot_fast.jobs.prefer.plan import prefer_plan
from oneshot_fast.jobs.prefer.run import ComparingRun
from oneshot_fast.planning.timing import Plan
from oneshot_fast.runtime.files import read_jsonl
from oneshot_fast.runtime.folder import list_settings
from oneshot_fast.runtime.processes import map_over_processes
from oneshot_fast.runtime.seeds import content_id, derived_seed, gaussian
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.run import contents_of, digest_of


class PairRun(ComparingRun):
    """Training on pairs of images into one folder: Diffusion-DPO and PSO.

    Winner and loser are made closer and farther from the noises that were assigned to each, or with
    ``pair_noise`` "random" both from new random ones. A pair whose image or noise cannot be read
    fails alone.
    """

    def __init__(
        self,
        generator: Generator,
        pairs: Sequence[PreferredPair],
        folder: Path,
        options: PreferOptions,
        *,
        matched: Sequence[MatchedPair] = (),
        failures: Sequence[Failure] = (),
        resolution: Resolution | None = None,
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            pairs: Better and worse images.
            folder: Where everything is written.
            options: Objective and schedule.
            matched: Lines of manifests that have the images' noises.
            failures: Lines that could not be used.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            **more: As for ``JudgedRun``.

        Raises:
            UserError: If an option makes no sense.
        """
        options.check_pairs()
        several = isinstance(generator, FewStepGenerator)
        require(
            several or options.pair_space == "eps",
            "--pair_space has no effect on one step, which takes the clean latents; leave it out",
        )
        self.targets = TargetImages(generator, resolution)
        prompts = [pair.prompt for pair in pairs]
        size = self.targets.size
        super().__init__(
            generator, options.pair_loss(several), prompts, folder, options, resolution=size, **more
        )
        assigned = options.pair_noise == "assigned"
        require(
            bool(matched) or not assigned,
            "pairs need the noises of their images: give --manifest_path of assign, for better and "
            "worse ones, or --pair_noise random",
        )
        self._levels = None
        if isinstance(generator, FewStepGenerator):
            self._levels = Levels(generator, self.noise_shape)
        self._noises = noises_by_image(matched) if assigned else {}
        self.pairs, self.failures = list(pairs), list(failures)
        self._found: list[tuple[PreferredPair, Tensor, Tensor]] = []

    def settings(self) -> dict[str, Any]:
        listed: list[PreferredPair | Failure] = [*self.pairs, *self.failures]
        listed.sort(key=lambda item: item.line or 0)
        failed = sorted(failure.line for failure in self.failures if failure.line)
        noises = sorted((key, pair.digest) for key, pair in self._noises.items())

        def identity(without: Container[int]) -> str:
            return content_id(*(vars(x) for x in listed if x.line not in without), *noises)

        return {
            "command": "prefer",
            "rewards": self.names,
            **self.options.settings(),
            "seed": self.seed,
            **self.generator.settings(self.size),
            "eval_samples": self.eval_samples,
            "samples": len(listed),
            **list_settings(None if self.begins_anew else self.folder, failed, identity),
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return prefer_plan(
            self.generator,
            self.options,
            resolution=self.size,
            samples=len(self.pairs),
            offload_encoders=self.offloads,
            pairs=True,
        )

    def learn(self) -> dict[str, Any]:
        """Read and encode the pairs, and train on them.

        Raises:
            RunError: If the training was interrupted and its pairs are not those of then.
        """
        begun, left_out = self.begun(self.pairs)
        gone = {failure.id for failure in left_out}
        pairs = [pair for pair in self.pairs if pair.id not in gone]
        failures = [*self.failures, *left_out]
        for pair, found in zip(pairs, self._read(pairs), strict=True):
            if isinstance(found, str):
                failures.append(Failure(found, pair.line, pair.id, pair.prompt, str(pair.image)))
            else:
                self._found.append((pair, *found))
        if not self._found:
            raise UserError(f"no pair can be used; the first: {failures[0].reason}")
        used, latents, noises = zip(*self._found, strict=True)
        self.begin(begun, contents_of(used, digest_of(noises), digest_of(latents)), failures)
        return self.compare(len(self._found)) | {"failed": len(failures)}

    def is_mended(self) -> bool:
        """Whether a pair that failed in the finished training can be read now."""
        lines = {row.get("line") for row in read_jsonl(self.folder / "failures.jsonl")}
        pairs = [pair for pair in self.pairs if pair.line in lines]
        return any(not isinstance(found, str) for found in self._read(pairs))

    def batch(self, rows: list[int], step: int) -> Batch:
        found = [self._found[k] for k in rows]
        texts = [pair.prompt for pair, *_ in found]
        seeds = [derived_seed(self.seed, "pair", step, k) for k in rows]
        if self._noises:
            noise = torch.stack([noise for *_, noise in found])
        else:  # one for both, which is evaluated once
            noise = gaussian(seeds, self.noise_shape)[:, None]
        targets = torch.stack([latents for _, latents, _ in found])
        extra: dict[str, Any] = {
            "targets": targets,
            "weight": torch.tensor([pair.weight for pair, *_ in found]),
        }
        if self._levels is not None:
            extra |= self._at_a_step(self._levels, step, seeds, targets, noise)
        device = self.generator.device
        extra = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in extra.items()}
        told = self.generator.told(texts, seeds)
        return Batch(preference=Rows(noise.to(device), told, extra), **self.preserved(step))

    def _at_a_step(
        self, levels: Levels, step: int, seeds: list[int], targets: Tensor, noise: Tensor
    ) -> dict[str, Any]:
        """What ``NoisedPairs`` takes: one step for all, and one noise for both images of a pair."""
        count = len(targets)
        k = derived_seed(self.seed, "pair step", step) % (len(levels.timesteps) - 1)
        noised, root = noise, torch.ones(count)
        if k:
            signal, scale = (part[:, None] for part in levels.of_step(k, count, targets))
            noised = signal * targets + scale * gaussian(seeds, self.noise_shape)[:, None]
            if self.options.pair_space == "eps":
                root = 1 / scale.flatten()
        scaled = root.view(-1, 1, 1, 1, 1) * targets
        return {
            "noised": noised, "step": [k] * count, "root": root, "targets": scaled,
        }  # fmt: skip

    def _read(self, pairs: Sequence[PreferredPair]) -> list[tuple[Tensor, Tensor] | str]:
        """Of each pair the latents and the noises, [2, C, h, w] each, or what is wrong."""

        def read(pair: PreferredPair) -> tuple[Tensor, Tensor] | str:
            try:
                found = [self._image(x, pair.prompt) for x in (pair.image, pair.rejected)]
            except DataError as error:
                return str(error)
            latents, noises = zip(*found, strict=True)
            return torch.stack(latents), torch.stack(noises)

        return [*map_over_processes(read, pairs)]

    def _image(self, image: ImageRef, prompt: str) -> tuple[Tensor, Tensor]:
        """An image's latent and noise, [C, h, w] each."""
        if not self._noises:
            return self.targets.latent(image, "crop"), torch.zeros(self.noise_shape)
        found = noise_of(self._noises, image, prompt)
        if found.frame is not None:
            raise DataError(f"{image}: its noise is of a bucket, and pairs are of one size")
        noise = read_noise(found.noise_path, found.noise_index)
        if tuple(noise.shape) != self.noise_shape:
            raise DataError(f"{found.noise_path}: the noise is {list(noise.shape)}")
        if found.image_sha256 not in (None, file_sha256(image)):
            raise DataError(f"{image} changed after its noise was assigned")
        return self.targets.latent(image, found.resize_mode), noise

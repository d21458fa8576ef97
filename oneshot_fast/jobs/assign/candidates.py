"""Base noises that are chosen, not pushed: best of many random ones, or matched from a shared pool.

Only the generator's forward pass is needed, and a chosen noise is an ordinary Gaussian sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import scipy.optimize
import torch
from torch import Tensor

from oneshot_fast.jobs.assign.features import features_of
from oneshot_fast.jobs.assign.objective import objective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import Target, problem_of
from oneshot_fast.runtime.seeds import derived_seed, gaussian

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator

_ROWS = 64  # noises generated, or compared, at once


class Chooser:
    """Replaces the base noises of targets by chosen ones, as ``options.method`` says."""

    def __init__(
        self,
        generator: Generator,
        options: AssignOptions,
        seed: int,
        on_evaluations: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Bind what all targets share.

        Args:
            generator: Its weights stay fixed.
            options: How noises are chosen.
            seed: Seed of the run.
            on_evaluations: Called with how many evaluations were done.
        """
        self._generator, self._seed = generator, seed
        self._options = options
        self._on_evaluations = on_evaluations

    @torch.no_grad()
    def choose(self, targets: list[Target]) -> list[Target]:
        """The same targets with chosen noises; without a choice, as they are."""
        if self._options.choice == "best_of_n":
            parts = (targets[k : k + _ROWS] for k in range(0, len(targets), _ROWS))
            return [found for part in parts for found in self._search(part)]
        if self._options.choice == "pool":
            groups: dict[str, list[Target]] = {}
            for target in targets:
                groups.setdefault(target.record.prompt, []).append(target)
            found = [t for group in groups.values() for t in self._match(group)]
            return sorted(found, key=lambda target: target.index)
        return targets

    def _search(self, targets: list[Target]) -> list[Target]:
        """Every target's best of its own candidates; the first is the base noise it came with."""
        problem = problem_of(targets)
        best = torch.full((len(targets),), float("inf"), device=problem.eps.device)
        first, chosen = best, torch.zeros_like(best, dtype=torch.int64)
        for k in range(self._options.draws):
            eps = problem.eps if k == 0 else self._noises(self._seeds(targets, k), problem.eps)
            loss = objective(
                self._generator, self._options, eps, dataclasses.replace(problem, eps=eps)
            )
            first = loss if k == 0 else first
            chosen = torch.where(loss < best, k, chosen)
            best = torch.minimum(loss, best)
            self._on_evaluations(len(targets))
        seeds = [self._seeds([t], k)[0] for t, k in zip(targets, chosen.tolist(), strict=True)]
        return self._chosen(targets, seeds, first.tolist())

    def _seeds(self, targets: Sequence[Target], k: int) -> list[int]:
        """Seeds of the candidates number ``k`` of all targets."""
        if k == 0:
            return [target.seed for target in targets]
        return [derived_seed(self._seed, target.record.id, k) for target in targets]

    def _noises(self, seeds: Sequence[int], like: Tensor) -> Tensor:
        return gaussian(seeds, like.shape[1:]).to(like.device)

    def _chosen(
        self, targets: Sequence[Target], seeds: Sequence[int], first: Sequence[float]
    ) -> list[Target]:
        noises = self._noises(seeds, targets[0].eps[None])
        return [
            dataclasses.replace(
                target,
                seed=seeds[k],
                eps=noises[k],
                start=None,
                candidates=self._options.draws,
                first_loss=first[k],
            )
            for k, target in enumerate(targets)
        ]

    def _match(self, targets: list[Target]) -> list[Target]:
        """Targets of one prompt, each matched with a noise of the pool that they share.

        One-to-one is the assignment of least total loss (Crouse 2016, scipy), as in immiscible
        diffusion (Li et al. 2024, arXiv 2406.12303); nearest is implicit maximum likelihood
        estimation (Li and Malik 2018, arXiv 1809.09087); dropping noises that are near already is
        RS-IMLE (Vashist et al. 2024, arXiv 2409.17439).
        """
        count = len(targets) * self._options.draws
        key = targets[0].record.id
        own = [t.seed for t in targets if t.start is not None]  # of an earlier assignment
        fresh = [derived_seed(self._seed, "pool", key, k) for k in range(count - len(own))]
        seeds = own + fresh
        losses = torch.cat([*self._losses(targets, seeds)], 1)  # [targets, noises]
        allowed = losses.nan_to_num(nan=float("inf"))
        near = losses.amin(0) < self._options.pool_reject_below
        if (~near).sum() >= len(targets):
            allowed[:, near] = float("inf")
        if self._options.pool_matching == "nearest":
            chosen = allowed.argmin(1).tolist()
        else:
            kept = (~near).nonzero()[:, 0] if allowed.isinf().any() else torch.arange(count)
            finite = allowed[:, kept].nan_to_num(torch.finfo(losses.dtype).max)
            chosen = kept[scipy.optimize.linear_sum_assignment(finite.numpy())[1]].tolist()
        return self._chosen(targets, [seeds[k] for k in chosen], losses.diagonal().tolist())

    def _losses(self, targets: Sequence[Target], seeds: Sequence[int]) -> Iterator[Tensor]:
        """Losses of all targets, [targets, at most 64 noises] at a time, on the CPU."""
        options, generator = self._options, self._generator
        latents = torch.stack([target.latent.flatten() for target in targets])
        images = [target.image.flatten() for target in targets if target.image is not None]
        features = [target.features for target in targets if target.features is not None]
        for start in range(0, len(seeds), _ROWS):
            eps = self._noises(seeds[start : start + _ROWS], targets[0].eps[None])
            prompts = targets[0].prompt.cat([targets[0].prompt] * len(eps))
            made = generator.latents(eps, prompts)
            loss = options.latent_loss_weight * _mean_squares(latents, made.flatten(1))
            decoded = generator.decode(made) if options.decodes else made
            if images:
                flat = decoded.flatten(1)
                l1 = torch.cdist(torch.stack(images), flat, p=1.0)
                loss += options.pixel_l1_weight * l1 / flat.shape[1]
            if options.features is not None:
                found = features_of(decoded, options.features)
                loss += options.feature_weight * _mean_squares(torch.stack(features), found)
            self._on_evaluations(len(eps))
            yield loss.cpu()


def _mean_squares(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared differences of the rows of ``a`` [M, n] from those of ``b`` [N, n], [M, N]."""
    # exact differences: through a product of matrices float32 would cancel
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / a.shape[1]

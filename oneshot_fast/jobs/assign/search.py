"""The noises of targets that come nearest to them: chosen, then moved.

A noise is chosen as the best of many random ones, or matched from a shared pool. Only the
generator's forward pass is needed for that, and it is an ordinary Gaussian sample.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from oneshot_fast.evaluation.features import features_of
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import Target, problem_of
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.search.candidates import best_of_n, drawing
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.solver import Solved, Solver

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
        """Bind what all targets share; ``on_evaluations`` is told how many were done."""
        self._generator, self._options, self._seed = generator, options, seed
        self._on_evaluations = on_evaluations
        self._objective = MatchingObjective(generator, options)
        self._solver = Solver(
            self._start, drawing(options.draws), _ROWS, on_evaluations=on_evaluations
        )

    @torch.no_grad()
    def choose(self, targets: list[Target]) -> list[Target]:
        """The same targets with chosen noises; without a choice, as they are."""
        if self._options.choice == "best_of_n":
            return [
                self._chosen(s.item, self._seed_of(s.item, s.best_step), s.z, s.losses[0])
                for part in self._solver.solve([targets])
                for s in part
            ]
        if self._options.choice == "pool":
            groups: dict[str, list[Target]] = {}
            for target in targets:
                groups.setdefault(target.record.prompt, []).append(target)
            found = [t for group in groups.values() for t in self._match(group)]
            return sorted(found, key=lambda target: target.index)
        return targets

    def _start(self, targets: Sequence[Target]) -> Search:
        """Each target's own candidates; the first is the base noise that it came with."""
        problem = problem_of(targets)

        def draw(k: int) -> Tensor:
            return self._noises([self._seed_of(target, k) for target in targets], problem.eps)

        return best_of_n(problem, self._objective, draw, self._options.draws)

    def _seed_of(self, target: Target, k: int) -> int:
        """Of candidate number ``k``."""
        return derived_seed(self._seed, target.record.id, k) if k else target.seed

    def _noises(self, seeds: Sequence[int], like: Tensor) -> Tensor:
        return gaussian(seeds, like.shape[1:]).to(like.device)

    def _chosen(self, target: Target, seed: int, eps: Tensor, first_loss: float) -> Target:
        return dataclasses.replace(
            target,
            seed=seed,
            eps=eps.to(target.eps.device),
            start=None,
            candidates=self._options.draws,
            first_loss=first_loss,
        )

    def _match(self, targets: list[Target]) -> list[Target]:
        """Targets of one prompt, each matched with a noise of the pool that they share.

        One-to-one is the assignment of least total loss (Crouse 2016, scipy), as in immiscible
        diffusion (Li et al. 2024, arXiv 2406.12303); nearest is implicit maximum likelihood
        estimation (Li and Malik 2018, arXiv 1809.09087); dropping noises that are near already is
        RS-IMLE (Vashist et al. 2024, arXiv 2409.17439).
        """
        from scipy.optimize import linear_sum_assignment

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
            chosen = kept[linear_sum_assignment(finite.numpy())[1]].tolist()
        noises = self._noises([seeds[k] for k in chosen], targets[0].eps[None])
        return [
            self._chosen(target, seeds[k], eps, first)
            for target, k, eps, first in zip(
                targets, chosen, noises, losses.diagonal().tolist(), strict=True
            )
        ]

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


class TargetSearch:
    """Finds the noises of many targets."""

    def __init__(
        self,
        generator: Generator,
        options: AssignOptions,
        *,
        seed: int = 0,
        batch_size: int = 16,
        on_evaluations: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Bind what all targets share.

        Args:
            generator: Its weights stay fixed.
            options: How a noise is searched.
            seed: Of the noises that are drawn to choose from.
            batch_size: Targets on the device at once; halved where memory runs out.
            on_evaluations: Called with how many evaluations, over all targets, were done.
        """
        objective = MatchingObjective(generator, options)
        self._chooser = Chooser(generator, options, seed, on_evaluations)
        self._solver: Solver[Target] = Solver(
            lambda targets: Search(problem_of(targets), options, objective),
            options,
            batch_size,
            # compiled code is for one batch size
            fixed_size=generator.is_compiled,
            advice="use a smaller --dtype or --resolution, or, where images are decoded, "
            "--decoder_checkpointing, --decoder_tiling or --decoder_id",
            on_evaluations=on_evaluations,
        )

    def solve(self, batches: Iterable[list[Target]]) -> Iterator[list[Solved[Target]]]:
        """What was found, a list per batch or, where targets stop early, as they finish.

        Raises:
            UserError: If not even one target fits into memory.
        """
        chosen = map(self._chooser.choose, batches)
        # what is searched side by side is of one size
        for _, alike in itertools.groupby(chosen, lambda targets: targets[0].eps.shape):
            yield from self._solver.solve(alike)

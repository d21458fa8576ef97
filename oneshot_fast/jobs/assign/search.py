"""The noises of targets that come nearest to them: chosen, then moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.candidates import Chooser
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import Target, problem_of
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.solver import Solved, Solver


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
        return self._solver.solve(map(self._chooser.choose, batches))

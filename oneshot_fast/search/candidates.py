"""The best of N random noises, by any objective."""

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from oneshot_fast.search.gradient import Search
from oneshot_fast.search.movers.mover import Mover, State
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Evaluation, Objective, Problem


def drawing(count: int) -> SearchOptions:
    """Options of a search that only draws ``count`` noises."""
    return SearchOptions(steps=count - 1)


def best_of_n(
    problem: Problem,
    objective: Objective,
    draw: Callable[[int], Tensor],
    count: int,
    images_at: Sequence[int] = (),
) -> Search:
    """A search whose steps are ``count`` random noises; the loss is the only thing it looks at.

    The first ones are the problem's base noises, number k is ``draw(k)`` [B, C, h, w]; the
    objective sees each as a base noise of its own. Images of the numbers ``images_at`` are kept,
    and ``best_step`` of the result is the number of the best noise.
    """

    def judge(z: Tensor, problem: Problem) -> Evaluation:
        return objective(z, dataclasses.replace(problem, eps=z))

    return Search(problem, drawing(count), judge, _Draws(draw), images_at)


class _Draws(Mover):
    """From each noise to the next one drawn; all searches side by side are at the same one."""

    first_step = 0.0
    differentiates = False

    def __init__(self, draw: Callable[[int], Tensor]) -> None:
        self._draw, self._drawn = draw, 0

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        return {"point": eps.clone()}

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        return point

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        self._drawn += 1
        return {"point": self._draw(self._drawn)}

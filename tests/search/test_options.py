"""Flags of a search: one name each, the earlier ones as aliases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tyro

from oneshot_fast.errors import UserError
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.search.movers.registry import mover_of
from oneshot_fast.search.options import SearchOptions


def parsed(kind: type[SearchOptions], flags: str) -> SearchOptions:
    return tyro.cli(kind, args=flags.split(), use_underscores=True)


@pytest.mark.parametrize("kind", [AssignOptions, OptimizeOptions])
def test_earlier_names_of_flags_and_values_still_work(kind: type[SearchOptions]) -> None:
    old = parsed(kind, "--assign_method search+free --drift_reg_weight 0.5")
    assert old == parsed(kind, "--method best_of_n+free --noise_l2_weight 0.5")
    assert (old.choice, old.mover, old.draws, old.norm_weight) == ("best_of_n", "free", 32, 0.01)


def test_help_names_the_aliases(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parsed(AssignOptions, "--help")
    said = capsys.readouterr().out
    assert "--assign_method" in said and "--drift_reg_weight" in said


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (SearchOptions("sphere"), (None, "sphere", 1, 40)),
        (SearchOptions("sphere", 4), ("best_of_n", "sphere", 4, 40)),
        (SearchOptions("best_of_n"), ("best_of_n", None, 32, 0)),
        (SearchOptions("best_of_n", 1), ("best_of_n", None, 1, 0)),
        (SearchOptions("pool+white", 8), ("pool", "white", 8, 40)),
    ],
)
def test_what_a_method_means(options: SearchOptions, found: tuple[Any, ...]) -> None:
    assert (options.choice, options.mover, options.draws, options.gradient_steps) == found


def test_the_usual_step_of_a_matrix_is_taken_as_it_is_or_refused() -> None:
    flags = "--method rotation --rotation_optimizer raw_adam --lr_unit matrix"
    eps, D = torch.randn(2, 4, 4, 4), 16
    moved = []
    for more in (f"{flags} --lr 5e-4", f"--method rotation --rotation_optimizer raw_adam --lr "
                                        f"{5e-4 * 2 * (D - 1) ** 0.5}"):  # fmt: skip
        options = parsed(AssignOptions, more)
        options.check()
        mover = mover_of(options)
        state, rate = mover.start(eps), torch.full((2,), float(options.lr))
        grad, step = (
            torch.randn(2, D, D, generator=torch.Generator().manual_seed(0)),
            torch.zeros(2),
        )
        moved.append(mover.move(state, eps, grad, step, rate)["point"])
    torch.testing.assert_close(*moved)
    assert moved[0].abs().max().item() == pytest.approx(5e-4, rel=1e-3)
    for refused in (flags, "--lr_unit matrix --lr 5e-4", f"{flags} --rotation_optimizer riemannian "
                                                         "--lr 5e-4"):  # fmt: skip
        with pytest.raises(UserError, match="lr_unit matrix is for the method rotation"):
            parsed(AssignOptions, refused).check()

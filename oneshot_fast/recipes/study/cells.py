"""The trainings that the study compares, all with the same budget."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.recipes.study.subjects import SubjectRecipe

BATCH_SIZE, LR = 32, 2e-4
_STEPS = 30  # of the gradient methods


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        name: For tables and files.
        assign: How noises are found; None: none are, training is on random noise.
        cycles: E-steps and M-steps.
        preserve: Weight of the latent preserve loss.
        new_noise: Whether the candidates are drawn anew in every cycle.
    """

    name: str
    assign: AssignOptions | None
    cycles: int = 1
    preserve: float = 0.0
    new_noise: bool = True

    @property
    def assign_nfe(self) -> int:
        """Generator evaluations per target that the E-steps take."""
        if self.assign is None:
            return 0
        chosen = self.assign.draws if self.assign.choice else 0
        return self.cycles * (chosen + 3 * self.assign.gradient_steps + 1)

    def epochs(self, budget: int) -> int:
        """Passes over the targets per M-step, so that all takes ``budget`` evaluations a target.

        A preserve noise costs as much as a pair, and a backward pass as much as two forwards.
        """
        each = 3 * (2 if self.preserve else 1)
        return max(1, round((budget - self.assign_nfe) / each / self.cycles))

    def training(self, budget: int) -> SftOptions:
        """How the M-step trains."""
        return SftOptions(
            epochs=self.epochs(budget),
            batch_size=BATCH_SIZE,
            lr=LR,
            preserve_latent_weight=self.preserve,
            preserve_pixel_weight=0.0,
            preserve_pool_size=256,
            noise="random" if self.assign is None else "matched",
        )


def cells(recipe: SubjectRecipe, quick: bool) -> list[Cell]:
    """All trainings, the plain ones first; with ``quick`` only one of each kind."""
    found = [Cell("direct SFT", None), *_by_gradients(recipe), *_by_choice()]
    if not quick:
        return found
    names = ("direct SFT", "sphere", "search 32", "EM, pool 16, 6 cycles")
    return [cell for cell in found if cell.name in names]


def _by_gradients(recipe: SubjectRecipe) -> Iterator[Cell]:
    options = partial(
        AssignOptions, steps=_STEPS, patch_size=recipe.patch_size, sphere_optimizer="adam"
    )
    yield Cell("direct SFT, preserve", None, preserve=0.5)
    usual = options("rotation", rotation_optimizer="raw_adam", lr=recipe.usual_step)
    yield Cell("rotation, usual lr", usual)
    yield Cell("rotation", options("rotation"))
    if recipe.tiles > 1:
        yield Cell("rotation, tiles", options("rotation", rotation_groups=recipe.tiles))
    yield Cell("white", options("white"))
    yield Cell("sphere", options("sphere"))
    yield Cell("sphere, preserve", options("sphere"), preserve=0.5)
    yield Cell("sphere, 10 steps", options("sphere", steps=10))
    for angle in (0.2, 0.4, 0.6, 0.8):
        yield Cell(f"sphere, {angle} rad", options("sphere", max_angle=angle))
    newton = partial(options, "sphere", sphere_optimizer="lbfgs")
    yield Cell("sphere, L-BFGS", newton())
    yield Cell("sphere, L-BFGS, 0.6 rad", newton(max_angle=0.6))
    both = options("best_of_n+sphere", candidates=32, steps=10, max_angle=0.3)
    yield Cell("search 32, then sphere 0.3 rad", both)
    yield Cell("EM, sphere 0.4 rad, 3 cycles", options("sphere", steps=10, max_angle=0.4), 3)


def _by_choice() -> Iterator[Cell]:
    best_of, pool = (partial(AssignOptions, method) for method in ("best_of_n", "pool"))
    for count in (8, 32, 96):
        yield Cell(f"search {count}", best_of(count))
    yield Cell("search 32, preserve", best_of(32), preserve=0.5)
    for count in (8, 32):
        yield Cell(f"pool {count}", pool(count))
    yield Cell("pool 32, nearest", pool(32, pool_matching="nearest"))
    yield Cell("EM, search 8, 6 cycles", best_of(8), 6)
    yield Cell("EM, search 8, 6 cycles, same noise", best_of(8), 6, new_noise=False)
    yield Cell("EM, pool 8, 6 cycles", pool(8), 6)
    yield Cell("EM, pool 16, 6 cycles", pool(16), 6)
    yield Cell("EM, pool 8, 6 cycles, preserve", pool(8), 6, preserve=0.5)

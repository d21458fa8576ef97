"""How a budget is spent on the noises of a prompt."""

import math
import operator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from oneshot_fast.errors import DataError, require
from oneshot_fast.runtime.files import read_json
from oneshot_fast.search.particles import Potential
from oneshot_fast.search.pruning import Schedule

CostUnit = Literal["flops", "seconds", "evaluations"]


@dataclass(frozen=True)
class ScaleOptions:
    """How a budget is spent on the noises of a prompt."""

    method: Literal["prune", "best_of_n", "fk", "svdd"] = "prune"
    """prune: drop the worst candidates on the way; best_of_n: follow all to the end; fk: particles
    that are copied by their rewards (Feynman-Kac steering); svdd: each line goes on with one of
    several next samples."""
    candidates: int | None = None
    """Noises of each image; of svdd, lines."""
    budget: float | None = None
    """Instead: as many as this pays for each image, in the unit of cost_unit."""
    cost_unit: CostUnit = "flops"
    """Of the budget: TFLOP as counted, seconds as measured at the start, or evaluations of the
    denoiser alone."""
    schedule: Path | None = None
    """prune: schedule.json of `scale search`, instead of after and keep."""
    after: tuple[int, ...] = ()
    """Steps, from 0, after which estimates are scored, and candidates dropped (TTSnap's, of 20
    steps: 2 6 11), particles copied, or next samples chosen."""
    keep: tuple[float, ...] = ()
    """prune: share that each prune keeps (TTSnap's: 0.4 0.4 0.5)."""
    compare: Literal["none", "best_of_n"] = "none"
    """best_of_n: also follow, from the same seeds, so many candidates to the end that they cost at
    least as much."""
    potential: Potential = "diff"
    """fk: what a weight is made of: rises of the reward, its maximum so far, its sum, itself."""
    inverse_temperature: float = 1.0
    """fk: lambda; the images aimed at are exp(lambda reward) times likelier than unsteered ones."""
    resample_below: float = 0.5
    """fk: copy once the effective number of particles is below this share; 1: at every score."""
    select: Literal["best", "sample"] = "best"
    """fk: the particle of the highest reward, or one drawn by the final weights."""
    branches: int = 4
    """svdd: next samples of each line; the first choice is among so many noises."""
    temperature: float = 0.0
    """svdd: alpha; the choice is drawn by exp(reward / alpha), 0: the highest."""

    def checked(self, steps: int, draws_noise: bool) -> "ScaleOptions":
        """With what ``schedule`` holds in its place; the file is read once.

        Raises:
            UserError: For values that make no sense with a sampler of so many steps.
        """
        given = [self.candidates is not None, self.budget is not None]
        require(sum(given) == 1, "give --candidates N or --budget COST: one of them")
        require(self.candidates is None or self.candidates >= 1, "give at least 1 --candidates")
        require(
            self.budget is not None or self.cost_unit == "flops",
            "--cost_unit is that of --budget; give both",
        )
        for methods, names in (
            (("prune",), ("schedule", "keep")),
            (("prune", "fk", "svdd"), ("after",)),
            (("prune", "fk", "svdd"), ("compare",)),
            (("fk",), ("potential", "inverse_temperature", "resample_below", "select")),
            (("svdd",), ("branches", "temperature")),
        ):
            for name in names:
                require(
                    self.method in methods or getattr(self, name) == getattr(ScaleOptions, name),
                    f"--{name} is for the method {' or '.join(methods)}; leave it out",
                )
        require(self.potential in get_args(Potential), f"no potential {self.potential}")
        require(0 < self.resample_below <= 1, "resample_below must be above 0 and at most 1")
        scale = self.inverse_temperature
        require(0 < scale < math.inf, f"inverse_temperature is {scale}; give one above 0, finite")
        require(self.branches >= 1, "give at least 1 --branches")
        alpha = self.temperature
        require(0 <= alpha < math.inf, f"temperature is {alpha}; give a finite one from 0")
        found = self
        if self.schedule is not None:
            require(
                not (self.after or self.keep),
                "--schedule holds the steps and shares; leave --after and --keep out",
            )
            plan = _read(self.schedule)
            found = replace(self, schedule=None, after=plan.after, keep=plan.keep)
        found._check_steps(steps, draws_noise)
        return found

    def _check_steps(self, steps: int, draws_noise: bool) -> None:
        plan = self.pruning
        require(
            steps > 1 or not plan.after,
            "with one step nothing can be pruned or steered on the way; leave --after out, or give "
            "--num_inference_steps",
        )
        if self.method == "prune":
            require(
                steps == 1 or bool(plan.after),
                "give --after STEPS and --keep SHARES, or --schedule FILE; without prunes it is "
                "--method best_of_n",
            )
            plan.check(steps)
            return
        Schedule(self.after, (1.0,) * len(self.after)).check(steps)
        if self.method in ("fk", "svdd") and steps > 1:
            require(bool(self.after), f"{self.method}: give --after STEPS, those that are scored")
            require(
                draws_noise,
                f"{self.method} needs a sampler that draws noise, or copies stay equal; give "
                "--cps_eta ancestral",
            )

    @property
    def pruning(self) -> Schedule:
        """When candidates are dropped; without shares where another method only scores.

        Of options that were ``checked``: they hold the schedule itself.
        """
        assert self.schedule is None
        return Schedule(self.after, self.keep)


def _read(path: Path) -> Schedule:
    found = read_json(path)
    try:
        part = found["schedule"]
        after, keep = tuple(part["after"]), tuple(map(float, part["keep"]))
        schedule = Schedule(tuple(map(operator.index, after)), keep)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} is no schedule of `scale search`") from None
    require(bool(schedule.after), f"{path} recommends Best-of-N; give --method best_of_n")
    return schedule

"""How a budget is spent on the noises of a prompt."""

import math
import operator
from collections.abc import Sequence
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


@dataclass(frozen=True)
class RewardTraining:
    """How a reward is trained for the estimates of a sampler's steps."""

    network: str | None = None
    """What is trained: by default the reward itself; classifier: the body of the packaged
    classifier of digits with one new output, which reads no prompt; thresholds: of thickness, its
    value at five grey levels, with a weight each; or another reward that has weights, such as
    python:module.Class."""
    levels: str | None = None
    """Steps, from 0, whose estimates are learnt from, such as 0:15, where 15 is no longer meant; by
    default all but the last 5 (of at most 6 steps: the last)."""
    epochs_per_level: int = 1
    """Passes over the images at each of these steps, from the latest step to the earliest."""
    batch_size: int = 100
    """Images per step."""
    lr: float | None = None
    """AdamW's learning rate, which falls to half within a level; by default TTSnap's: 3e-6 of
    imagereward, 5e-7 of CLIP's; 3e-4 of classifier, 2e-2 of thresholds, 1e-4 of digit."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 5.0
    """Gradients are scaled down to this norm."""
    pair_weight: float = 0.0
    """Weight of the cross-entropy of which of two images of a prompt is better; then a batch has
    images of one prompt."""
    holdout: float = 0.2
    """Share of the prompts that are kept aside to measure; no text is on both sides."""
    one_network: bool = False
    """Keep the last level's network alone, for all steps, instead of each step's best."""
    baseline: bool = True
    """With --network: also train it as long on finished images alone, to compare."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in ("epochs_per_level", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; give at least 1")
        require(0 < self.holdout < 1, "holdout must be between 0 and 1")
        for name in ("weight_decay", "pair_weight"):
            fits = 0 <= getattr(self, name) < math.inf
            require(fits, f"{name} is {getattr(self, name)}; give a finite number from 0")

    def levels_of(self, steps: Sequence[int]) -> list[int]:
        """The levels, the latest first, of data with these ``steps``.

        Raises:
            UserError: If one is not among them, or there is none.
        """
        last = steps[-1]
        if self.levels is None:
            end = last - 4 if last > 5 else last
            found = [step for step in steps if step < end]
        else:
            found = sorted({*parsed_steps(self.levels, "levels")})
        for step in found:
            require(step in steps, f"levels has step {step}; the data have {[*steps]}")
        require(bool(found), f"the data have no step to learn from, only {[*steps]}")
        return found[::-1]


def parsed_steps(text: str, flag: str) -> list[int]:
    """Numbers of steps written as 0:15,19, where 15 is no longer meant.

    Raises:
        UserError: If it is written otherwise; ``flag`` says of what.
    """
    found = list[int]()
    for part in text.split(","):
        ends = part.split(":")
        known = len(ends) <= 2 and all(end.strip().isdecimal() for end in ends)
        require(known, f"{flag} is {text}; write it as 0:15,19")
        first = int(ends[0])
        steps = range(first, int(ends[1]) if len(ends) == 2 else first + 1)
        require(bool(steps), f"{flag} has {part}, which is no step; write it as 0:15,19")
        found += steps
    return found


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

"""`em --recipe auto`: short trainings that say how noises are found, and how large the steps are.

Two rounds of successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): the ways to find
noises, then other learning rates of the better one. Each is a cycle from the base generator on a
part of the targets; the rest and the held-out pairs judge them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oneshot_fast.evaluation.distances import Verdict
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.em.options import EmOptions

OTHER_RATES = (0.3, 3.0)  # times the first round's learning rate
PART = 1 / 3  # of the whole effort that trials may take
MOST, FEWEST = 2 / 3, 16  # share and number of the targets that trials train on
MOST_JUDGES = 200  # other targets that judge, beside the held-out pairs


@dataclass(frozen=True)
class Trial:
    """A short training.

    Attributes:
        method: How its noises were found, as --assign_method.
        lr: Its learning rate.
        verdict: What it is against the base, or why that is not known.
    """

    method: str
    lr: float
    verdict: Verdict | str

    @property
    def gain(self) -> float:
        """How much better than the base it is."""
        return -float("inf") if isinstance(self.verdict, str) else self.verdict.gain

    @property
    def row(self) -> dict[str, Any]:
        """As a JSON value."""
        found = {"method": self.method, "lr": self.lr}
        if isinstance(self.verdict, str):
            return {**found, "verdict": None, "reason": self.verdict}
        return {**found, "verdict": dataclasses.asdict(self.verdict) | {"word": self.verdict.word}}


def name_of_trial(method: str, lr: float) -> str:
    """Of its files."""
    return f"{method}-{lr:g}"


def run_trials(options: EmOptions, attempt: Callable[[str, float], Verdict | str]) -> list[Trial]:
    """All trials; ``attempt`` trains with a method and a learning rate, and judges."""
    lr = _rate(options)
    first = [Trial(method, lr, attempt(method, lr)) for method in options.methods]
    method = max(first, key=lambda trial: trial.gain).method
    return first + [Trial(method, k * lr, attempt(method, k * lr)) for k in OTHER_RATES]


def winner(trials: Sequence[Trial], between: Callable[[Trial, Trial], Verdict | None]) -> Trial:
    """The first trial, or one that beats the base, and all kept before it, by more than its error.

    The first has the user's own options. A gain that may be luck changes nothing: neither how
    noises are found nor the learning rate. The base is a candidate at the end of all cycles again:
    ``checkpoint-best`` is the base where none of them beat it.

    Args:
        trials: At least one, the methods before the other rates.
        between: A verdict on two of them, in pairs.
    """
    kept = trials[0]
    for trial in trials[1:]:
        if isinstance(trial.verdict, str) or trial.gain <= trial.verdict.error:
            continue
        found = None if isinstance(kept.verdict, str) else between(kept, trial)
        if isinstance(kept.verdict, str) or (found and found.gain > found.error):
            kept = trial
    return kept


def follow(options: EmOptions, method: str, lr: float) -> EmOptions:
    """All cycles with another way to find noises and another learning rate, at the same cost.

    What a cheaper E-step saves goes into more cycles.
    """
    found = dataclasses.replace(options, assign_method=method, train_lr=lr)
    cycles = round(len(options.schedule()) * _cycle(options) / _cycle(found))
    return dataclasses.replace(found, num_cycles=max(1, cycles))


def short(options: EmOptions, method: str, lr: float) -> EmOptions:
    """Options of a trial: a cycle."""
    return dataclasses.replace(
        options, recipe=None, assign_method=method, train_lr=lr, num_cycles=1
    )


def trained_on(options: EmOptions, count: int) -> int:
    """How many of ``count`` targets trials train on: with so many they take ``PART`` of all.

    That is counted in evaluations of the denoiser by E- and M-steps, see ``evaluations``; what is
    drawn to be measured comes on top.
    """
    tried = [short(options, method, _rate(options)) for method in options.methods]
    rounds = len(tried) + len(OTHER_RATES)
    trials = sum(map(_e_step, tried)) + rounds * _m_step(options)
    share = PART / (1 - PART) * len(options.schedule()) * _cycle(options) / trials
    return int(count * min(MOST, share))


def evaluations(options: AssignOptions) -> float:
    """Of the denoiser per target; a backward pass counts as two."""
    return (options.draws if options.choice else 0) + 3.0 * options.gradient_steps + 1


def _e_step(options: EmOptions) -> float:
    return evaluations(options.assign())


def _m_step(options: EmOptions) -> float:
    training = options.sft()
    return 3.0 * training.epochs * (2 if training.preserves else 1)


def _cycle(options: EmOptions) -> float:
    return _e_step(options) + _m_step(options)


def _rate(options: EmOptions) -> float:
    assert options.train_lr is not None
    return options.train_lr


def said_of_recipe(found: Mapping[str, Any]) -> str:
    """The decision of recipe.json, in a line."""
    return (
        f"recipe: assign_method {found['method']}, train_lr {found['lr']:.2g}, "
        f"num_cycles {found['num_cycles']}"
    )

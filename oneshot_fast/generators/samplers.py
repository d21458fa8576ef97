"""Which scheduler takes several steps: the pipeline's, or what has to stand in for it."""

from typing import Any, Literal

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SCMScheduler,
    TCDScheduler,
)

from oneshot_fast.errors import ModelError, UserError, refused
from oneshot_fast.generators.schedulers import CPSEulerScheduler, CPSScheduler, Eta
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

# schedulers whose steps know nothing of the steps before
_KNOWN = (
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
)
# of Euler's noise levels, where they are not those of evenly spaced timesteps
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def check_known(scheduler: Any) -> None:
    """Raise ModelError unless several steps can be taken by it."""
    if not isinstance(scheduler, _KNOWN):
        known = ", ".join(kind.__name__ for kind in _KNOWN)
        name = type(scheduler).__name__
        raise ModelError(f"the scheduler is {name}; several steps are taken by {known}")


def trailing(scheduler: Any) -> Any:
    """The scheduler, or in sigma space Euler's whose steps begin at the noisiest timestep.

    Raises:
        ModelError: If it is neither a flow's nor in sigma space.
    """
    if _space(scheduler) == "flow":
        return scheduler
    config, spaced = scheduler.config, [k for k in _SPACINGS if scheduler.config.get(k)]
    is_known = isinstance(scheduler, (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler))
    if is_known and config.timestep_spacing == "trailing" and not spaced:
        return scheduler
    if is_main():
        name = type(scheduler).__name__
        say(f"the student's steps are those of EulerDiscreteScheduler, trailing, not of its {name}")
    how = {"timestep_spacing": "trailing", **dict.fromkeys(_SPACINGS, False)}
    return EulerDiscreteScheduler.from_config(config, **how)


def without_memory(scheduler: Any) -> Any:
    """The scheduler, or Euler's at its timesteps for PNDM, whose steps know of those before."""
    if not isinstance(scheduler, PNDMScheduler):
        return scheduler
    if is_main():
        say("its PNDMScheduler remembers earlier steps: EulerDiscreteScheduler takes its place")
    config = scheduler.config
    how = {key: config[key] for key in ("timestep_spacing", "steps_offset")}
    return EulerDiscreteScheduler.from_config(config, **how)


def with_cps(scheduler: Any, eta: Eta) -> Any:
    """CPS with the settings of a scheduler, at whose timesteps it has to be set.

    Raises:
        UserError: If there is none of its kind, or ``eta`` makes no sense.
    """
    check_known(scheduler)
    kind = CPSScheduler if _space(scheduler) == "flow" else CPSEulerScheduler
    with refused(UserError, "--cps_eta: "):
        return kind.from_config(scheduler.config, eta=eta)


def _space(scheduler: Any) -> Literal["flow", "sigma"]:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    if isinstance(scheduler, SCMScheduler):
        raise ModelError(
            "the scheduler is SCMScheduler, neither a flow's nor in sigma space, as students and "
            "--cps_eta need it"
        )
    return "sigma"

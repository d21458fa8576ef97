"""What both steps of an EM run will need; writes nothing."""

from oneshot_fast.jobs.em.cycles import Cycles
from oneshot_fast.jobs.sft.plan import sft_plan
from oneshot_fast.runtime.units import duration


def em_plan(run: Cycles) -> str:
    """The plans of the first cycle's steps, and the time of all cycles, for a person."""
    options, first = run.options, run.first()
    e_step, samples = first.plan(), first.total or 0
    side = run.targets.resolution
    m_step = sft_plan(run.generator, options.sft(), resolution=side, samples=samples)
    cycles = len(options.schedule())
    needed = duration(cycles * (e_step.seconds + m_step.seconds))
    return (
        f"E-step\n{e_step}\n\nM-step\n{m_step}\n\n"
        f"in all, {cycles} cycles: {needed}, without the evaluations"
    )

"""What both steps of an EM run will need; writes nothing."""

from oneshot_fast.jobs.assign.plan import assign_plan
from oneshot_fast.jobs.em.rewards import RewardEmRun
from oneshot_fast.jobs.em.targets import EmRun
from oneshot_fast.jobs.optimize.plan import optimize_plan
from oneshot_fast.jobs.sft.plan import sft_plan
from oneshot_fast.runtime.units import duration


def em_plan(run: EmRun | RewardEmRun) -> str:
    """The plans of the first cycle's steps, and the time of all cycles, for a person."""
    generator, options, side = run.generator, run.options, run.targets.resolution
    if isinstance(run, RewardEmRun):
        first = run.searcher(1, run.folder, run.seed)
        samples = len(first.samples)
        e_step = optimize_plan(first.search, first.samples, first.batch_size)
    else:
        samples = len(run.records)
        e_step = assign_plan(
            generator,
            options.assign(),
            resolution=side,
            batch_size=options.assign_batch_size,
            samples=samples,
            num_images=run.num_images,
        )
    m_step = sft_plan(generator, options.sft(), resolution=side, samples=samples)
    cycles = len(options.schedule())
    needed = duration(cycles * (e_step.seconds + m_step.seconds))
    return (
        f"E-step\n{e_step}\n\nM-step\n{m_step}\n\n"
        f"in all, {cycles} cycles: {needed}, without the evaluations"
    )

"""Noises whose images score high, found in memory and without a folder."""

from collections.abc import Sequence

from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import require
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.search import RewardSearch
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.search.problem import Assignment
from oneshot_fast.search.samples import samples_of
from oneshot_fast.search.solver import stacked


def optimize_noise(
    generator: Generator,
    prompts: Sequence[str],
    rewards: WeightedRewards,
    options: OptimizeOptions = OptimizeOptions(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    seeds: Sequence[int] = (),
    images_per_prompt: int = 1,
    batch_size: int = 16,
    resolution: Resolution | None = None,
) -> Assignment:
    """Find, for each prompt, noises from which the generator makes images of high reward.

    It is the search of ``OptimizeRun``, which keeps its results in a folder and can be resumed.

    Args:
        generator: Its weights stay fixed.
        prompts: N prompts.
        rewards: Score the images; differentiable unless the method is best_of_n.
        options: How a noise is searched.
        seed: Of the base noises, and of those that are drawn to choose from.
        seeds: Instead: the seeds of each prompt's base noises.
        images_per_prompt: Noises of each prompt, one after the other.
        batch_size: Images on the device at once; halved where memory runs out.
        resolution: Image side in pixels, or height and width; by default the generator's own.

    Returns:
        For each image its noise ``z`` [B, C, h, w], ``losses`` (minus the reward, and penalties)
        and ``scores`` by reward and in "total", [steps + 1, B], and ``best_images``
        [B, 3, H, W] uint8, on the CPU. Without gradient steps the candidates are the steps.

    Raises:
        UserError: If an option makes no sense, a reward has no gradient where one is needed, or
            memory runs out.

    Example:
        >>> from oneshot_fast.generators.loading import load_generator
        >>> from oneshot_fast.jobs.optimize.in_memory import optimize_noise
        >>> from oneshot_fast.jobs.optimize.options import OptimizeOptions
        >>> from oneshot_fast.rewards import load_rewards
        >>> generator, rewards = load_generator("tiny"), load_rewards(["digit"])
        >>> prompts = ["a photo of the digit three"]
        >>> best = optimize_noise(generator, prompts, rewards, OptimizeOptions(steps=2))
        >>> best.z.shape, best.scores["digit"].shape, best.best_images.shape
        (torch.Size([1, 4, 8, 8]), torch.Size([3, 1]), torch.Size([1, 3, 64, 64]))
        >>> pictures = generator.generate(prompts, best.z)
    """
    samples = samples_of(prompts, images_per_prompt, seed, seeds)
    require(bool(samples), "there is no prompt")
    search = RewardSearch(generator, rewards, options, resolution=resolution)
    parts = [samples[k : k + batch_size] for k in range(0, len(samples), batch_size)]
    found = [one.last for part in parts for one in search.solve(part)]
    return stacked(found)

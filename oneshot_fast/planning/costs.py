"""What one evaluation of a generator and one verification of an image cost."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from oneshot_fast.data.sizes import Size
from oneshot_fast.generators.base import Generator
from oneshot_fast.planning import memory
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.ledger import say

_WARM_UPS, _TIMED = 2, 5


@dataclass(frozen=True)
class Work:
    """What is paid for one image, in any unit.

    Attributes:
        evaluation: One evaluation of the denoiser, both halves of guidance together.
        verification: Decoding an estimate and all of its scores.
    """

    evaluation: float
    verification: float


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOP of the CPU's fused attention, which torch's counter leaves out (shapes come in)."""
    return sdpa_flop_count(query, key, value)


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def count_flops(generator: Generator, rewards: WeightedRewards, size: Size, prompt: str) -> Work:
    """FLOP, 2 for a multiply-add, attention included, of one image of this size.

    Counted by torch's FlopCounterMode on tensors without data. Prompts are not: they are encoded
    once. A reward that cannot run so, such as one of the user's, is left out with a warning.

    Args:
        generator: What is evaluated, and decodes.
        rewards: What verifies.
        size: Height and width of the image in pixels.
        prompt: One that the rewards take.
    """
    with memory.fake_copy(generator) as fake, torch.no_grad():
        copies = memory.fake_rewards(rewards, prompt, fake)
        z, told = torch.zeros(1, *fake.noise_shape(*size)), fake.blank_prompts(1)
        evaluation, found = counted(lambda: fake.evaluate(0, z, told).latents)
        verification, images = counted(lambda: fake.images(found))
        for name, reward in copies.by_name.items():
            try:
                verification += counted(
                    functools.partial(copies.score, reward, images, [prompt], {})
                )[0]
            except Exception as error:
                say(f"warning: reward {name} is not counted: {type(error).__name__}")
    return Work(evaluation, verification)


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """FLOP of ``run``, and what it returns."""
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        found = run()
    return counter.get_total_flops(), found


def median_seconds(run: Callable[[], object]) -> float:
    """Of 5 runs after 2 to warm up; each must end on the device."""
    found = []
    for _ in range(_WARM_UPS + _TIMED):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found[_WARM_UPS:])

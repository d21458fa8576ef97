"""What is known of published models by their names, or those in their files."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_ONE_STEP = r".*(?<![a-z\d])1[-_ ]?step(?!s?[-_ ]?\d)"
# models whose one step starts below the noisiest timestep, as their own pages call them: DMD2 (Yin
# et al. 2024, arXiv 2405.14867), the UNets of Hyper-SD (Ren et al. 2024, arXiv 2404.13686), whose
# LoRAs start at the noisiest, and PixArt's DMD
_STARTS = {
    rf"dmd2{_ONE_STEP}": 399.0,
    rf"hyper[-_ ]?sd{_ONE_STEP}(?!.*lora)": 800.0,
    r"pixart.*dmd": 400.0,
}
_BASES = (
    r"xl[-_]base|stable-diffusion-v1|stable-diffusion-2|(?<![a-z])sd[-_ ]?v?1[-._]?[45](?!\d)|"
    r"stable-diffusion-3(\.5)?-(medium|large)|flux\.?1-dev|pixart-xl|z-image(?![a-z])"
)
_DISTILLED = r"turbo|lightning|hyper|lcm|tcd|dmd|schnell|sprint|flash|step"
DISTILLED = "SDXL-Turbo, SD-Turbo, Hyper-SD, DMD2, SDXL-Lightning or FLUX.1-schnell"


def known_start(names: Iterable[str]) -> float | None:
    """Timestep at which the one step of a known model begins; None for the noisiest.

    Args:
        names: Paths or hub ids of the model or of its files; what counts is their last part.
    """
    for name in names:
        for pattern, timestep in _STARTS.items():
            if re.search(pattern, Path(name).name, re.IGNORECASE):
                return timestep
    return None


def is_base(names: Sequence[str]) -> bool:
    """Whether the first name is that of a model that was never distilled, and none of one that was.

    The others are those of its LoRAs.
    """
    ends = [Path(name).name for name in names]
    distilled = (re.search(_DISTILLED, end, re.IGNORECASE) for end in ends)
    return bool(re.search(_BASES, ends[0], re.IGNORECASE)) and not any(distilled)

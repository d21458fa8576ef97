"""Noises of images at hand, found in memory and without a folder."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from oneshot_fast.data.images import crop_loss, cut_warning, load_image, resized
from oneshot_fast.data.records import Record
from oneshot_fast.data.sizes import Resolution, Size, size_of
from oneshot_fast.errors import require
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.features import target_features
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.search import TargetSearch
from oneshot_fast.jobs.assign.targets import Target
from oneshot_fast.runtime.seeds import derived_seed, gaussian, record_seed
from oneshot_fast.search.problem import Assignment
from oneshot_fast.search.solver import in_order, stacked

Pictures = Tensor | Sequence[Image.Image | Path | str]


def assign_noise(
    generator: Generator,
    prompts: Sequence[str],
    images: Pictures,
    options: AssignOptions = AssignOptions(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    eps: Tensor | None = None,
    batch_size: int = 16,
    resolution: Resolution | None = None,
    resize_mode: str = "crop",
) -> Assignment:
    """Find, for N images, the noises that the generator maps closest to them.

    It is the search of ``AssignRun``, which keeps its results in a folder and can be resumed, for
    records with the ids "0", "1", ...

    Args:
        generator: Its weights stay fixed.
        prompts: N prompts.
        images: [N, 3, H, W] in [0, 1] RGB, of a size that the generator makes; or N Pillow images
            or paths, which are resized.
        options: How a noise is searched.
        seed: Of the base noises, and of those that are drawn to choose from.
        eps: Instead: base noises, [N, C, h, w], N(0, 1).
        batch_size: Images on the device at once; halved where memory runs out.
        resolution: Side in pixels, or height and width, that Pillow images and files are resized
            to; by default the generator's own.
        resize_mode: "crop" scales to cover the size and cuts the centre; "squash" changes the
            aspect; "pad" fills both sides with black.

    Returns:
        ``z`` [N, C, h, w], ``best_loss`` [N], ``losses`` [steps + 1, N] and more, on the CPU.
        Where a loss became NaN, the best one before it counts.

    Raises:
        UserError: If an option makes no sense, numbers or sizes do not match, or memory runs out.
        DataError: If a file cannot be read.

    Example:
        >>> from oneshot_fast.generators.loading import load_generator
        >>> from oneshot_fast.jobs.assign.in_memory import assign_noise
        >>> from oneshot_fast.jobs.assign.options import AssignOptions
        >>> generator = load_generator("tiny")
        >>> prompts = ["a photo of the digit three"]
        >>> pictures = generator.generate(prompts, seed=7)
        >>> found = assign_noise(generator, prompts, pictures, AssignOptions(steps=2))
        >>> found.z.shape, found.losses.shape
        (torch.Size([1, 4, 8, 8]), torch.Size([3, 1]))
        >>> closest = generator.generate(prompts, found.z)
    """
    options.check()
    size = size_of(resolution or generator.image_size)
    if isinstance(images, Tensor):
        pictures = [*images]
    else:
        pictures = [_read(image, size, resize_mode) for image in images]
        cut = [(f"number {k}", crop_loss(image, size)) for k, image in enumerate(images)]
        if resize_mode == "crop" and (said := cut_warning(cut, 'resize_mode "pad" keeps all')):
            warnings.warn(said, stacklevel=2)
    require(
        len(prompts) == len(pictures) > 0,
        f"expected as many prompts as images, at least one, got {len(prompts)} and {len(pictures)}",
    )
    H, W = pictures[0].shape[-2:]
    shape, device = generator.noise_shape(H, W), generator.device
    seeds = [derived_seed(seed, str(k)) for k in range(len(prompts))]
    eps = gaussian(seeds, shape) if eps is None else eps.float()
    expected = (len(prompts), *shape)
    require(eps.shape == expected, f"expected eps of shape {expected}, got {tuple(eps.shape)}")
    targets = []
    for k, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        image = picture.float().to(device)
        targets.append(
            Target(
                k,
                Record(str(k), k + 1, prompt, "", Path()),
                seeds[k],
                "",
                generator.is_truncated(prompt),
                eps[k].to(device),
                generator.told([prompt], [record_seed(str(k))]),
                generator.encode_image(image).to(device),
                image if options.pixel_l1_weight else None,
                None if options.features is None else target_features(image, options.features),
            )
        )
    search = TargetSearch(generator, options, seed=seed, batch_size=batch_size)
    return stacked(in_order(search.solve([targets])))


def _read(picture: Image.Image | Path | str, size: Size, resize_mode: str) -> Tensor:
    """[3, H, W] float32 in [0, 1]."""
    if isinstance(picture, Image.Image):
        return resized(picture.convert("RGB"), *size, resize_mode)
    return load_image(Path(picture), *size, resize_mode)

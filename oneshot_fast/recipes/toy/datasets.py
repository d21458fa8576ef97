"""The data sets of the small generators, and how each generator is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from oneshot_fast.errors import UserError
from oneshot_fast.recipes.toy.critics import HingeCritic, LogisticCritic, MakeCritic
from oneshot_fast.recipes.toy.data import LabelledImages, digits, shapes
from oneshot_fast.recipes.toy.files import cifar10, mnist

DatasetName = Literal["digits", "mnist", "cifar10", "shapes"]


@dataclass(frozen=True)
class Recipe:
    """One data set and its generator.

    Attributes:
        read: Images of a split ("train" or "heldout"), some from a folder of the user's.
        noise_shape: [C, h, w] of a noise.
        steps: Training steps of the generator.
        width: Its channels at the full resolution.
        against: Makes the critic it is trained against.
        batch_size: Images per step.
        needs_files: Whether ``read`` needs the folder.
    """

    read: Callable[[str, Path], LabelledImages]
    noise_shape: tuple[int, int, int]
    steps: int
    width: int
    against: MakeCritic = HingeCritic
    batch_size: int = 64
    needs_files: bool = False

    def images(self, split: str, root: Path | None) -> LabelledImages:
        """Images of a split.

        Raises:
            UserError: If the folder is needed, but not given or not as expected.
        """
        if self.needs_files and root is None:
            raise UserError("give --data_root DIR, which holds MNIST/raw or cifar-10-batches-py")
        return self.read(split, root or Path())


RECIPES: dict[DatasetName, Recipe] = {
    "digits": Recipe(lambda split, _: digits(split), (64, 1, 1), 3000, 24),
    "shapes": Recipe(lambda split, _: shapes(split, size=16), (4, 8, 8), 3000, 24),
    "mnist": Recipe(mnist, (64, 1, 1), 1500, 24, LogisticCritic, 32, needs_files=True),
    "cifar10": Recipe(
        cifar10, (128, 1, 1), 1500, 24, partial(LogisticCritic, penalty=2.0), 32, needs_files=True
    ),
}

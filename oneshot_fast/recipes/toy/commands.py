"""What ``python -m oneshot_fast.toy`` does: prepare data, then call the package's own commands."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from oneshot_fast.assign import AssignCommand
from oneshot_fast.assign import execute as execute_assign
from oneshot_fast.cli import OK
from oneshot_fast.data.options import DataOptions
from oneshot_fast.em import EmCommand
from oneshot_fast.em import execute as execute_em
from oneshot_fast.errors import require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.recipes.toy.data import LabelledImages
from oneshot_fast.recipes.toy.datasets import RECIPES, DatasetName, Recipe
from oneshot_fast.runtime.files import write_folder
from oneshot_fast.runtime.options import RunOptions, pick
from oneshot_fast.runtime.processes import is_main, main_first
from oneshot_fast.sft import SftCommand
from oneshot_fast.sft import execute as execute_sft
from oneshot_fast.training.options import KeepOptions

_SFT = SftOptions(epochs=20, batch_size=16, lr=1e-4)


@dataclass(frozen=True)
class ToyOptions:
    """What all of them take."""

    dataset: DatasetName = "digits"
    """digits and shapes need no files; mnist and cifar10 are read from --data_root."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw (IDX .gz files) or cifar-10-batches-py (the Python batches)."""
    work_dir: Path | None = None
    """Folder of all results; by default runs/toy/DATASET."""

    @property
    def recipe(self) -> Recipe:
        """The data set's."""
        return RECIPES[self.dataset]

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.work_dir or Path("runs/toy") / self.dataset

    @property
    def model_id(self) -> str:
        """The trained generator.

        Raises:
            UserError: If there is none.
        """
        folder = self.folder / "train" / "model"
        command = f"python -m oneshot_fast.toy train --dataset {self.dataset}"
        require(folder.is_dir(), f"no generator in {folder}; train it first: {command}")
        return str(folder)


@dataclass(frozen=True)
class TrainCommand(ToyOptions):
    """Train a small label-conditioned one-step generator, and the classifier that judges it."""

    steps: int | None = None
    """Training steps of the generator; by default the data set's."""
    width: int | None = None
    """Channels at the full resolution; by default the data set's."""
    eval_samples: int = 1000
    """Random noises on which the generator is measured."""
    seed: int = 0
    """Seed of weights, batches and noises."""
    overwrite: bool = False
    """Train anew where there is another generator."""

    def execute(self) -> int:
        """Run ``toy train``."""
        from oneshot_fast.recipes.toy.train_run import train
        from oneshot_fast.report.measures import print_measures

        given = {"steps": self.steps, "width": self.width}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        require(all(value >= 1 for value in changes.values()), "steps and width must be at least 1")
        require(self.eval_samples >= 10, "eval_samples must be at least 10")
        folder = self.folder / "train"
        summary = train(
            folder,
            dataclasses.replace(self.recipe, **changes),
            *(self.recipe.images(split, self.data_root) for split in ("train", "heldout")),
            seed=self.seed,
            samples=self.eval_samples,
            overwrite=self.overwrite,
        )
        print_measures({name: summary[name] for name in ("generator", "real images")})
        print(f"\ntook {summary['seconds']:.0f} s; generator: {folder / 'model'}")
        print(f"samples: {folder / 'eval' / 'base.png'}")
        return OK


@dataclass(frozen=True)
class PairOptions(ToyOptions):
    """Which images are the targets."""

    test_split: bool = False
    """Take the targets from the test split instead of the training split. Give this and num_pairs
    to all commands alike: images that were targets are left out of the comparison."""
    num_pairs: int = 256
    """Targets, drawn at random."""
    run: RunOptions = RunOptions()
    device: str | None = None
    """cuda, cpu, ...; by default cuda where there is one."""

    @property
    def model(self) -> ModelOptions:
        """Options of the generator."""
        return ModelOptions(device=self.device)

    @property
    def others(self) -> int:
        """Where in the test split the images begin that are no targets."""
        return self.num_pairs if self.test_split else 0

    def pairs(self) -> Path:
        """Folder with the targets, written where it is not there."""
        return self.write("heldout" if self.test_split else "train", 0, self.num_pairs)

    def write(self, split: str, start: int, stop: int) -> Path:
        """Folder with images ``start`` to ``stop`` of a split, written where it is not there."""
        name = "test" if split == "heldout" else split
        folder = self.folder / "data" / f"{name}-{start}-{stop}"

        def write() -> None:
            if folder.exists():
                return
            images = self.recipe.images(split, self.data_root)
            require(
                0 <= start < min(stop, len(images.images)),
                f"of the {len(images.images)} images of the {name} split, {start} to {stop} are "
                "wanted; change --num_pairs",
            )
            with write_folder(folder) as temporary:
                images.write_pairs(temporary, stop - start, start=start)

        main_first(write)
        return folder

    def patch(self, size: int) -> int:
        """The patch side ``size``, but 1 where the noise is a plain vector."""
        return min(size, self.recipe.noise_shape[-1])

    def real(self) -> LabelledImages:
        """At most 1000 images of the test split that are no targets."""
        return self.recipe.images("heldout", self.data_root).sample(1000, start=self.others)

    def compare(self, real: LabelledImages, code: int) -> int:
        """Print what there is side by side, on the same noises, and return ``code``."""
        from oneshot_fast.recipes.toy.compare import compare
        from oneshot_fast.report.measures import print_measures

        if is_main():
            print("\nOn 1000 random noises, beside real images that are no targets:")
            print_measures(compare(self.folder, real, seed=self.run.seed))
            print(f"samples: {self.folder / 'comparison'}")
        return code


@dataclass(frozen=True)
class AssignToyCommand(PairOptions):
    """Find the noise of every target: ``python -m oneshot_fast.assign`` on a small generator."""

    batch_size: int | Literal["auto"] = "auto"
    """Targets solved at once; see python -m oneshot_fast.assign."""
    num_images: int = 16
    """Targets whose images before and after are saved and shown in the report; -1 for all."""
    dry_run: bool = False
    """Print memory, disk and time needed; nothing but the data is written."""
    search: AssignOptions = AssignOptions()

    def execute(self) -> int:
        """Run ``toy assign``."""
        patch_size = self.patch(self.search.patch_size)
        command = pick(
            AssignCommand,
            self,
            model_id=self.model_id,
            output_dir=self.folder / "assign",
            search=dataclasses.replace(self.search, patch_size=patch_size),
            data=DataOptions(data_root=str(self.pairs())),
            model=self.model,
        )
        return execute_assign(command)


@dataclass(frozen=True)
class SftToyCommand(PairOptions):
    """Train the generator on the assigned noises: ``python -m oneshot_fast.sft``."""

    dry_run: bool = False
    """Print memory, disk and time needed; nothing is written."""
    training: SftOptions = _SFT
    keep: KeepOptions = KeepOptions()

    matched: ClassVar[bool] = True

    def execute(self) -> int:
        """Run ``toy sft`` or ``toy direct_sft``, and compare all that is there."""
        manifest = self.folder / "assign" / "manifest.jsonl"
        again = f"python -m oneshot_fast.toy assign --dataset {self.dataset}"
        require(manifest.is_file(), f"no such file: {manifest}; assign first: {again}")
        noise: Literal["matched", "random"] = "matched" if self.matched else "random"
        real = self.real()
        command = pick(
            SftCommand,
            self,
            manifest_path=((manifest,),),
            model_id=self.model_id,
            output_dir=self.folder / ("sft" if self.matched else "direct_sft"),
            training=dataclasses.replace(self.training, noise=noise),
            model=self.model,
        )
        code = execute_sft(command)
        return code if self.dry_run else self.compare(real, code)


@dataclass(frozen=True)
class DirectSftToyCommand(SftToyCommand):
    """The baseline: train on the same targets with new random noise at every step."""

    matched: ClassVar[bool] = False


@dataclass(frozen=True)
class EmToyCommand(PairOptions):
    """Alternate both: ``python -m oneshot_fast.em`` on a small generator."""

    num_heldout: int = 144
    """Images of the test split, no targets, that are measured against and assigned."""
    eval_samples: int = 500
    """Random noises on which the generator is measured before, between and after the cycles."""
    compare_direct: bool = False
    """Also train directly on random noise, with as many steps, and show it beside EM."""
    num_images: int = 16
    """Targets per E-step whose images are saved and shown; -1 for all."""
    save_minutes: float = 5.0
    """Minutes between saved training states; 0 saves after every step."""
    dry_run: bool = False
    """Print memory, disk and time needed; nothing but the data is written."""
    em: EmOptions = EmOptions(
        num_cycles=2, assign_steps=40, train_epochs=_SFT.epochs, train_batch_size=16,
        train_lr=_SFT.lr,
    )  # fmt: skip

    def execute(self) -> int:
        """Run ``toy em`` and compare all that is there."""
        patch_size, real = self.patch(self.em.patch_size), self.real()
        command = pick(
            EmCommand,
            self,
            work_dir=self.folder / "em",
            initial_model_id=self.model_id,
            heldout_root=self.write("heldout", self.others, self.others + self.num_heldout),
            em=dataclasses.replace(self.em, patch_size=patch_size),
            data=DataOptions(data_root=str(self.pairs())),
            model=self.model,
        )
        code = execute_em(command)
        return code if self.dry_run else self.compare(real, code)

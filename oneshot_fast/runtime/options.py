"""The flags of every resumable command, and options that are made of other options."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from oneshot_fast.errors import need_package, require

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept and shown."""

    seed: int = 0
    """Seed of the run; each sample's own seed follows from it and from the sample's id."""
    overwrite: bool = False
    """Start anew in a folder that holds another run, instead of resuming."""
    verify: bool = False
    """Read every file of a run that goes on, or is finished, and compare its hash with the one that
    was noted when it was written; otherwise only sizes, and the hashes of small files."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log losses and sample pictures to this tracker."""
    tracker_project: str = "oneshot_fast"
    """W&B: project; the run is named after its folder, and goes on when it is resumed."""
    timeout_minutes: float = 720.0
    """Several processes: how long one is waited for before the job ends."""

    def check(self) -> None:
        """Raise UserError for values that make no sense, or a package that is missing."""
        require(
            self.report_to == "wandb" or self.tracker_project == RunOptions.tracker_project,
            "--tracker_project has no effect without --report_to wandb; give it, too",
        )
        if self.report_to != "none":
            need_package(self.report_to, f"--report_to {self.report_to}")

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of every job's ``run``."""
        project = f":{self.tracker_project}" if self.report_to == "wandb" else ""
        report_to = self.report_to + project
        return {"overwrite": self.overwrite, "report_to": report_to, "verify": self.verify}


def pick(
    kind: type[Options], source: "DataclassInstance", prefix: str = "", **given: Any
) -> Options:
    """Options of another kind, filled with the fields that ``source`` has, too.

    Args:
        kind: Dataclass to make; fields that are not found keep their defaults.
        source: A field ``name`` of ``kind`` has its value from the field ``prefix + name`` here, or
            else from ``name``.
        prefix: Such as "train_".
        **given: Values that go before those of ``source``.
    """
    names = {field.name for field in dataclasses.fields(source)}
    for field in dataclasses.fields(kind):
        for name in (prefix + field.name, field.name):
            if name in names:
                given.setdefault(field.name, getattr(source, name))
    return kind(**given)

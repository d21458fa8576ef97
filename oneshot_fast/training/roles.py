"""One model as student, fake and teacher of a distillation: adapters of one network, or three."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from oneshot_fast.generators.adapters import role
from oneshot_fast.generators.few_step import FewStepGenerator

FAKE = "fake"
Role = Literal["student", "fake", "teacher"]
_ROLES = ("student", "fake", "teacher")


class Roles:
    """Gives the generator in a role, which is the only way to change it.

    With adapters there is one base network: the fake has an adapter of it, the student all others,
    and the teacher is the base without. Else the fake and the teacher are copies of the denoiser.
    """

    def __init__(
        self, generator: FewStepGenerator, adapts: bool, teacher: FewStepGenerator | None = None
    ) -> None:
        """Take ``generator`` as it is now, before it is trained.

        Args:
            generator: The student.
            adapts: Whether adapters are trained, of one base.
            teacher: Another model, which the fake begins as, too; without adapters.
        """
        self._adapts = adapts
        self._of: dict[str, FewStepGenerator] = dict.fromkeys(_ROLES, generator)
        if adapts:
            return
        base = generator if teacher is None else teacher
        others = [*base.networks.values()][1:]
        shared: dict[int, Any] = {id(part): part for part in (*others, base.decoder)}
        self._of["fake"] = copy.deepcopy(base, {**shared})
        self._of["teacher"] = teacher or copy.deepcopy(base, {**shared})

    @classmethod
    def of_one(cls, generator: FewStepGenerator) -> "Roles":
        """All three roles without a difference, for a plan."""
        roles = cls.__new__(cls)
        roles._adapts, roles._of = False, dict.fromkeys(_ROLES, generator)
        return roles

    @property
    def fake(self) -> FewStepGenerator:
        """Whose module has the fake's weights."""
        return self._of["fake"]

    @contextmanager
    def __call__(self, name: Role) -> Iterator[FewStepGenerator]:
        """The generator in a role, meanwhile."""
        generator = self._of[name]
        if not self._adapts:
            yield generator
            return
        denoiser: Any = generator.denoiser
        known = [*getattr(denoiser, "peft_config", {})]
        student = [adapter for adapter in known if adapter != FAKE]
        with role(denoiser, {"student": student, "fake": [FAKE], "teacher": []}[name]):
            yield generator

"""One model as student, fake and teacher of a distillation: adapters of one network, or three."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from oneshot_fast.generators.adapters import role
from oneshot_fast.generators.few_step import FewStepGenerator

FAKE = "fake"
Role = Literal["student", "fake", "teacher"]
_ADAPTERS = {"student": "default", "fake": FAKE, "teacher": None}


class Roles:
    """Gives the generator in a role, which is the only way to change it.

    With adapters there is one base network: the student and the fake each have an adapter of it,
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
        self._of: dict[str, FewStepGenerator] = dict.fromkeys(_ADAPTERS, generator)
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
        roles._adapts, roles._of = False, dict.fromkeys(_ADAPTERS, generator)
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
        with role(generator.denoiser, _ADAPTERS[name]):
            yield generator

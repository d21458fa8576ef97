"""One model as student, fake and teacher of a distillation: adapters of one network, or three."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from oneshot_fast.errors import require
from oneshot_fast.generators.adapters import role
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.runtime.processes import processes
from oneshot_fast.training.optimizer import WeightOptimizer

FAKE = "fake"
Role = Literal["student", "fake", "teacher"]
_ROLES = ("student", "fake", "teacher")


def check_offload(offload: bool, adapts: bool) -> None:
    """Raise UserError where networks cannot wait on the CPU: adapters, several processes."""
    require(
        not (offload and adapts),
        "--offload has no effect where student, fake and teacher are one network with adapters; "
        "leave it out",
    )
    require(
        not offload or processes().num_processes == 1,
        "--offload is for one process: DDP keeps what it moves on the GPU; leave it out",
    )


class Roles:
    """Gives the generator in a role, which is the only way to change it.

    With adapters there is one base network: the fake has an adapter of it, the student all others,
    and the teacher is the base without. Else the fake and the teacher are copies of the denoiser,
    which can wait on the CPU until their role comes.
    """

    def __init__(
        self,
        generator: FewStepGenerator,
        adapts: bool,
        teacher: FewStepGenerator | None = None,
        offload: bool = False,
    ) -> None:
        """Take ``generator`` as it is now, before it is trained.

        Args:
            generator: The student.
            adapts: Whether adapters are trained, of one base.
            teacher: Another model, which the fake begins as, too; without adapters.
            offload: Whether networks, and optimisers' moments, are on the CPU while they are idle;
                without adapters. The student's network stays.
        """
        self._adapts = adapts
        self._of: dict[str, FewStepGenerator] = dict.fromkeys(_ROLES, generator)
        self._home, self._away = generator.device, torch.device("cpu")
        self._offload, self._waiting = offload, set[str]()
        if adapts:
            return
        base = generator if teacher is None else teacher
        others = [*base.networks.values()][1:]
        shared: dict[int, Any] = {id(part): part for part in (*others, base.decoder)}
        for name, own in (("teacher", teacher), ("fake", None)):
            self._of[name] = own or copy.deepcopy(base, {**shared})
            if offload:
                self._of[name].denoiser.to(self._away)
                self._waiting.add(name)

    @classmethod
    def of_one(cls, generator: FewStepGenerator) -> "Roles":
        """All three roles without a difference, for a plan."""
        roles = cls.__new__(cls)
        roles._adapts, roles._of = False, dict.fromkeys(_ROLES, generator)
        roles._offload, roles._waiting = False, set()
        return roles

    @property
    def fake(self) -> FewStepGenerator:
        """Whose module has the fake's weights."""
        return self._of["fake"]

    def turn(self, name: Role, optimizers: Mapping[str, WeightOptimizer]) -> None:
        """Let the moments wait, too, but for those of the role that is trained next."""
        for of, optimizer in optimizers.items() if self._offload else ():
            optimizer.move(self._home if of == name else self._away)

    @contextmanager
    def present(self, name: Role) -> Iterator[None]:
        """Meanwhile a role's network is on the device."""
        if name not in self._waiting:
            yield
            return
        self._waiting.remove(name)
        try:
            self._of[name].denoiser.to(self._home)
            yield
        finally:
            self._of[name].denoiser.to(self._away)
            self._waiting.add(name)

    @contextmanager
    def __call__(self, name: Role) -> Iterator[FewStepGenerator]:
        """The generator in a role, meanwhile."""
        generator = self._of[name]
        if not self._adapts:
            with self.present(name):
                yield generator
            return
        denoiser: Any = generator.denoiser
        known = [*getattr(denoiser, "peft_config", {})]
        student = [adapter for adapter in known if adapter != FAKE]
        with role(denoiser, {"student": student, "fake": [FAKE], "teacher": []}[name]):
            yield generator

"""How a student is distilled."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Fixed, Suppress

from oneshot_fast.errors import require
from oneshot_fast.training.options import TrainOptions


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """How the student is trained."""

    epochs: int = 10
    """Passes over images_per_prompt new noises of each prompt."""
    batch_size: int = 16
    """Images per step."""
    lr: float = 3e-5
    """AdamW's learning rate of the student."""
    use_ema: bool = True
    """End with an exponential moving average of the weights."""
    ema_decay: float = 0.99
    """For --use_ema; it rises to this value over the first steps."""
    # the teacher is what is held on to, and three roles share one network
    preserve_latent_weight: Suppress[Fixed[float]] = 0.0
    preserve_pixel_weight: Suppress[Fixed[float]] = 0.0
    preserve_batch_size: Suppress[Fixed[int | None]] = None
    preserve_pool_size: Suppress[Fixed[int]] = 512
    optimizer_in_backward: Suppress[Fixed[bool]] = False
    objective: Literal["ac_dmd", "dmd"] = "ac_dmd"
    """ac_dmd matches the student's samples at the noise level where its last step ends, dmd clean
    ones alone; with one step they are the same."""
    teacher_guidance: float = 5.0
    """The teacher's classifier-free guidance: SDXL 5 to 8, SD3 7, SD3.5 4.5, tiny-teacher 2; 1 is
    none. The student learns to do without."""
    ttur: int = 5
    """Steps of the fake, the network that follows the student's samples, to one of the student."""
    fake_lr: float | None = None
    """The fake's learning rate; by default twice lr."""
    fake_space: Literal["auto", "noise"] = "auto"
    """How the fake's error is weighed. auto: as published for flows, which favours high noise, and
    by the noise that was added for the others; noise: that for flows, too."""
    consistency_weight: float = 0.01
    """Weight of the fake's consistency along stochastic steps; 0 leaves it out, two evaluations
    less per step of the fake. Of ac_dmd alone."""

    def check(self) -> None:
        super().check()
        require(self.ttur >= 1, f"ttur is {self.ttur}; give at least 1")
        for name in ("latent_weight", "pixel_weight", "batch_size", "pool_size"):
            name = f"preserve_{name}"
            require(
                getattr(self, name) == getattr(DistillOptions, name),
                f"the teacher is what is held on to; leave {name} out",
            )
        guidance, fake_lr = self.teacher_guidance, self.fake_lr
        require(
            1 <= guidance < math.inf,
            f"teacher_guidance is {guidance}; give a number from 1, which is none",
        )
        require(
            fake_lr is None or 0 < fake_lr < math.inf,
            f"fake_lr is {fake_lr}; give a positive number",
        )
        weight = self.consistency_weight
        require(
            0 <= weight < math.inf, f"consistency_weight is {weight}; give 0 or a positive number"
        )
        require(
            self.objective == "ac_dmd" or weight == DistillOptions.consistency_weight,
            "consistency_weight has no effect with objective dmd; leave it out",
        )
        require(
            not self.optimizer_in_backward, "optimizer_in_backward: three roles share one network"
        )

    @property
    def of_fake(self) -> TrainOptions:
        """How the fake is trained."""
        lr = 2 * self.lr if self.fake_lr is None else self.fake_lr
        return dataclasses.replace(self, lr=lr, use_ema=False, lora_from=None)

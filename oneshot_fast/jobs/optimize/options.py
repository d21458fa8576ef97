"""How a noise is searched for a reward."""

from dataclasses import dataclass
from typing import Literal

from oneshot_fast.errors import require
from oneshot_fast.search.movers.registry import mover_of
from oneshot_fast.search.options import SearchOptions


@dataclass(frozen=True)
class OptimizeOptions(SearchOptions):
    """How a noise is searched."""

    steps: int = 50
    """Gradient steps."""
    sphere_optimizer: Literal["lbfgs", "adam"] = "adam"
    """sphere and white: Adam, or L-BFGS, whose steps are at most lr long."""
    free_optimizer: Literal["adam", "sgd"] = "sgd"
    """free: as ReNO does SGD with Nesterov momentum on clipped gradients, or Adam."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        super().check()
        require(self.choice != "pool", "a pool needs targets; use best_of_n")
        mover_of(self)

"""Finds the role whose update broke a run, and says how to go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from fdistill.base.errors import NonFiniteError
from fdistill.config.sections import OptimizerConfig
from fdistill.training.stages import Stage

#: How many times an update may multiply the norm of a role's weights before it is suspected, and the updates between
#: two records before the run is stopped. AdamW moves each weight by about lr, and weights are about 0.01 to 1.
_SUSPECT, _BROKEN = 2.0, 100.0
_CAREFUL = 0.01  # how far an advised learning rate moves the weights in an update, relative to their norm

#: {role: (norm of its gradient, 0-d, norms of its weights before and after the update, [2])}
Applied = Mapping[str, tuple[Tensor, Tensor]]


class Leap(NamedTuple):
    """A role, and the norms of its weights before and after updates that were out of range."""

    role: str
    before: float
    after: float

    def path(self) -> str:
        """From where to where."""
        return f"from {self.before:.3g} to {self.after:.3g}"

    def within(self, most: float) -> bool:
        """Whether the norm is at most so many times what it was; false for a norm that is no number."""
        return self.after <= most * max(self.before, 1e-30)


class BrokenRunError(NonFiniteError):
    """A run broke during training.

    Attributes:
        leap: the first update that was out of range; None if none was.
    """

    def __init__(self, message: str, leap: Leap | None):
        super().__init__(message)
        self.leap = leap


def first_leap(steps: Iterable[Applied]) -> Leap | None:
    """The first update that was out of range though its gradient was finite; later ones may be what it broke."""
    for step in steps:
        for role, (grad_norm, weights) in step.items():
            leap = Leap(role, *weights.tolist())
            if math.isfinite(grad_norm.item()) and math.isfinite(leap.before) and not leap.within(_SUSPECT):
                return leap
    return None


def check_growth(weights: Mapping[str, Tensor]) -> None:
    """Raises NonFiniteError if the weights of a role have left the range of weights, finite as they may be: nothing can
    be resumed from them, and what is trained beside them is lost.

    Args:
        weights: for each role the norms of its weights before and after each update, [N, 2].
    """
    for role, norms in weights.items():
        leap = Leap(role, *norms[[0, -1], [0, 1]].tolist())
        if not leap.within(_BROKEN):
            raise NonFiniteError(f"{role}: its updates took the norm of its weights {leap.path()}")


def advice(role: str, leap: Leap | None, stage: Stage) -> str:
    """What to add to the command, after updates of `role` broke the run in a stage: another learning rate."""
    lr = stage.config.roles[role].lr
    lower = min(lr / 10, OptimizerConfig().lr)
    if leap is not None and leap.role == role and math.isfinite(leap.after):
        lower = min(lr / 10, _CAREFUL * lr * leap.before / leap.after)
    setting = f"{role}.lr={float(f'{lower:.0e}'):g}"
    if "lr" in stage.changes.get(role, {}):
        return f"write {setting} into stage {stage.number} of the config, and add --resume"
    return f"add --resume {setting}"

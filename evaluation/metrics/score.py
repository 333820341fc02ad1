"""A number with what is known of its uncertainty, and which way it is better."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Score:
    """A value and its spread.

    Attributes:
        spread: a standard error or deviation; None where none is known.
        spread_of: what the spread is taken over, as "20 bootstrap replicates", "10 splits", "3 seeds".
    """

    value: float
    spread: float | None = None
    spread_of: str = ""


#: By pattern of the metric's name, the first that fits; a metric that none fits is better neither way.
_HIGHER_IS_BETTER: dict[str, bool] = {
    "*fid*": False,
    "*kid*": False,
    "fd_*": False,
    "inception_score": True,
    "precision": True,
    "recall": True,
    "density": True,
    "coverage": True,
    "authenticity": True,
    "*accuracy": True,
    "*diversity*": True,
    "clip*": True,
}


def higher_is_better(metric: str) -> bool | None:
    """None for a metric that is better neither way, as far as is known here."""
    return next((higher for pattern, higher in _HIGHER_IS_BETTER.items() if fnmatchcase(metric, pattern)), None)

"""A number with what is known of its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Score"]


@dataclass(frozen=True)
class Score:
    """A value and its spread.

    Attributes:
        spread: a standard error or standard deviation; None if it is not known.
        spread_of: what the spread was computed over, as "20 bootstrap replicates", "10 splits", "3 seeds".
    """

    value: float
    spread: float | None = None
    spread_of: str = ""

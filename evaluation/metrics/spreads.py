"""Scores that are means over images, with their standard errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evaluation.metrics.score import Score

if TYPE_CHECKING:
    from torch import Tensor


def mean_score(values: Tensor, scale: float = 1.0, over: str = "images") -> Score:
    """scale times the mean of independent values [N], with its standard error; a single value has no spread.

    Args:
        over: what the values are of, for `Score.spread_of`.
    """
    values = scale * values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return Score(mean)
    return Score(mean, values.std().item() / math.sqrt(len(values)), f"standard error over {len(values)} {over}")


def binomial_score(share: float, count: int) -> Score:
    """A share p of n = `count` independent images, with its standard error sqrt(p (1 - p) / n)."""
    share = min(max(share, 0.0), 1.0)  # a float32 mean of ones can be above 1
    return Score(share, math.sqrt(share * (1 - share) / count), "binomial")

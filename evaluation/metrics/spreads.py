"""Scores that are means of per-image numbers, with their standard errors."""

from __future__ import annotations

import math

from torch import Tensor

from evaluation.metrics.score import Score


def mean_score(values: Tensor, scale: float = 1.0, over: str = "images") -> Score:
    """scale * the mean of [N] with its standard error over independent values; no spread for a single one."""
    values = scale * values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return Score(mean)
    return Score(mean, values.std().item() / math.sqrt(len(values)), f"standard error over {len(values)} {over}")


def binomial_score(share: float, count: int) -> Score:
    """A share of `count` independent images with its standard error sqrt(p (1 - p) / n)."""
    share = min(max(share, 0.0), 1.0)  # a float32 mean of ones may come out above 1
    return Score(share, math.sqrt(share * (1 - share) / count), "binomial")

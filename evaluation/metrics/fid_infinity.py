"""Frechet distance extrapolated to infinitely many samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.frechet import distance_to
from evaluation.metrics.moments import Moments
from evaluation.metrics.rows import check_rows
from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError


def frechet_infinity(rows: Tensor, reference: Moments, *, points: int = 15, seed: int = 0) -> Score:
    """Intercept of a line through distances of random subsets of rows over 1 / size (Chong and Forsyth 2020).

    See arXiv 1911.07023, section 4: the bias of the distance falls as 1/N. Sizes are evenly spaced from
    max(2 D, N / 10) (5,000 for 50,000 rows, as in the paper) to N; at fewer than 2 D rows the bias is no line.

    Returns:
        The intercept and its standard error in the fit. That does not know that all subsets come from the same rows:
        intercepts of other rows vary about twice as much, somewhat more than `frechet_score` of them.

    Raises:
        ArgumentError: fewer than 4 D rows, widths differ, NaN or infinite rows, or fewer than 3 points.
    """
    if points < 3:
        raise ArgumentError(f"points: expected at least 3 for a line and its error, got {points}")
    width = reference.width
    if rows.shape[1:] != (width,):
        raise ArgumentError(f"rows: expected [N, {width}] as the reference's features, got {list(rows.shape)}")
    check_rows(rows, more_than=4 * width - 1, why=f"a line in 1/N needs sizes from twice the {width} features on")
    generator, distance = np.random.default_rng(seed), distance_to(reference)
    sizes = np.linspace(max(2 * width, len(rows) // 10), len(rows), points).astype(int)
    distances = []
    for size in sizes:
        chosen = torch.zeros(len(rows), dtype=torch.int64)
        chosen[torch.from_numpy(generator.choice(len(rows), size, replace=False))] = 1
        distances.append(distance(Moments.of(rows, chosen)))
    # Least squares through (1 / size, distance).
    x, y = 1 / sizes, np.array(distances)
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    intercept = y.mean() - slope * x.mean()
    residual = y - intercept - slope * x
    error = np.sqrt(residual @ residual / (points - 2) * (1 / points + x.mean() ** 2 / (centred @ centred)))
    return Score(float(intercept), float(error), f"standard error of the fit through {points} subset sizes")

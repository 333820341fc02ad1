"""The Frechet distance extrapolated to infinitely many samples, which removes most of its bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evaluation.metrics.frechet import distance_to
from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_rows
from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.metrics.moments import Moments


def frechet_infinity(rows: Tensor, reference: Moments, *, points: int = 15, seed: int = 0) -> Score:
    """The intercept of a line fitted to distances of random subsets over 1 / subset size (Chong and Forsyth 2020).

    The bias of the distance falls as 1 / N (arXiv 1911.07023, section 4). Subset sizes are evenly spaced from
    max(2 D, N / 10), which is 5,000 for 50,000 rows as in the paper, to N. Below 2 D rows the bias is not linear in
    1 / N.

    Args:
        rows: features of the samples [N, D], N >= 4 D.
        points: number of subsets, at least 3.
        seed: which random subsets are drawn.

    Returns:
        The intercept, and its standard error in the fit. All subsets come from the same rows, so the standard error is
        too small: intercepts of other samples of the same model vary about twice as much as it says, and somewhat
        more than their `frechet_score`.

    Raises:
        ArgumentError: fewer than 4 D rows or 3 points, another number of features than the reference, or rows that are
            not finite.
    """
    import torch

    from evaluation.metrics.moments import Moments

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


def frechet_infinity_metric(name: str, features: str) -> Metric:
    """The extrapolated distance in these features, under the name `name`."""

    def compute(measured: Measured) -> dict[str, Score]:
        return {name: frechet_infinity(measured.samples[features], measured.moments[features])}

    return Metric(
        name=name,
        outputs=(name,),
        higher_is_better=False,
        compute=compute,
        features=(features,),
        min_samples=lambda width: 4 * width,
        against="moments",
    )

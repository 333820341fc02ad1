"""Density and coverage: like precision and recall, but not inflated by outliers of the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.distances import distance_blocks, neighbour_radii
from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_pair
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score, mean_score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


def density_coverage(rows: Tensor, reference_rows: Tensor, neighbours: int = 5) -> tuple[Score, Score]:
    """(density, coverage) of Naeem et al. 2020 (arXiv 2002.09797), eq. 3 and 4.

    Each reference row has a ball around it that reaches to its k-th nearest other reference row. Density is the mean
    number of balls that contain a sample, divided by k: 1 for equal distributions, above 1 if samples crowd where the
    reference is dense. Coverage is the share of balls that contain a sample. A row on the surface of a ball is outside
    of it, as in the authors' program: a set measured against itself has density 1 and coverage 1.

    Args:
        rows, reference_rows: features [N, D] of generated and [M, D] of real images, on one device.
        neighbours: k, at least 1 and smaller than N and M.

    Returns:
        Density with the standard error of its mean over samples, coverage with its binomial standard error.

    Raises:
        ArgumentError: numbers of features differ, there are too few rows, or rows are not finite.
    """
    import torch

    if neighbours < 1:
        raise ArgumentError(f"neighbours: expected at least 1, got {neighbours}")
    check_pair(rows, reference_rows, more_than=neighbours, why=f"each needs {neighbours} neighbours")
    radii = neighbour_radii(reference_rows, neighbours)
    covered = torch.zeros_like(radii, dtype=torch.bool)
    balls = []
    for _, distances in distance_blocks(rows, reference_rows):
        inside = distances < radii
        covered |= inside.any(dim=0)
        balls.append(inside.sum(dim=1))
    density = torch.cat(balls).double() / neighbours
    return mean_score(density), binomial_score(covered.double().mean().item(), len(reference_rows))


def density_coverage_metric(features: str) -> Metric:
    """Density and coverage in these features."""

    def compute(measured: Measured) -> dict[str, Score]:
        density, coverage = density_coverage(*measured.on_device(features))
        return {"density": density, "coverage": coverage}

    return Metric(
        name="density_coverage",
        outputs=("density", "coverage"),
        higher_is_better=True,
        compute=compute,
        features=(features,),
        min_samples=lambda width: 6,
        against="rows",
    )

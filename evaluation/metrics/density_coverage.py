"""Density and coverage, which outliers of the reference do not inflate as they do precision and recall."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.metrics.distances import distance_blocks, neighbour_radii
from evaluation.metrics.rows import check_pair
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score, mean_score
from fdistill.base.errors import ArgumentError


def density_coverage(rows: Tensor, reference_rows: Tensor, neighbours: int = 5) -> tuple[Score, Score]:
    """(density, coverage) of Naeem et al. 2020 (arXiv 2002.09797), eq. 3 and 4.

    Each reference row has a ball that reaches to its k-th nearest other one. Density is the mean number of balls that a
    sample is inside of, over k: 1 for equal distributions, above 1 for samples that crowd where the reference is dense.
    Coverage is the share of balls with a sample inside. Inside is strict, as in the authors' program: a set against
    itself has density 1 and coverage 1.

    Args:
        rows, reference_rows: [N, D] and [M, D], generated and real, on one device.
        neighbours: k; both sets must be larger.

    Returns:
        Density with the standard error of its mean over samples, coverage with its binomial one.

    Raises:
        ArgumentError: widths differ, too few rows, NaN or infinite rows.
    """
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

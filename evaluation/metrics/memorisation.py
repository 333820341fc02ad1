"""Whether samples are copies of training images, by their nearest ones in feature space."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evaluation.metrics.distances import distance_blocks
from evaluation.metrics.rows import check_pair, check_rows
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score

_NAMES = ("rows", "training rows")
_CHUNK = 4096  # rows in float64 at a time


def nearest(rows: Tensor, training_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Euclidean distance float64 [N], index int64 [N]) of each row's nearest training row; a copy's distance is 0.

    Args:
        rows, training_rows: [N, D] and [M, D] on one device.

    Raises:
        ArgumentError: widths differ, a set is empty, NaN or infinite rows.
    """
    check_pair(rows, training_rows, _NAMES)
    return _nearest(rows, training_rows, None)


def authenticity(rows: Tensor, training_rows: Tensor) -> Score:
    """Share of samples further from their nearest training row than this is from its own nearest other one.

    Alaa et al. 2022 (arXiv 2102.08921), section 4.2. Copies score 0 and samples far from all training images 1. New
    images of the same distribution do not score 1, but the chance that two neighbours are not each other's nearest: 1/3
    for features in one dimension, 0.38 in two, towards 1/2 in many. Compare with the score of held-out images.

    Returns:
        The share with its binomial standard error.

    Raises:
        ArgumentError: as `nearest`; fewer than two training rows.
    """
    check_pair(rows, training_rows, _NAMES)
    check_rows(training_rows, "training rows", more_than=1, why="the nearest one must have a neighbour")
    distance, index = _nearest(rows, training_rows, None)
    met, where = index.unique(return_inverse=True)
    of_training, _ = _nearest(training_rows[met], training_rows, met)
    return binomial_score((distance > of_training[where]).double().mean().item(), len(rows))


def _nearest(rows: Tensor, training_rows: Tensor, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """`nearest`, where row i may not find training row excluded[i]."""
    found = []
    for first, distances in distance_blocks(rows, training_rows):
        if excluded is not None:
            distances.scatter_(1, excluded[first : first + len(distances), None], math.inf)
        found.append(distances.argmin(dim=1))
    index = torch.cat(found)
    # The distances once more, from the differences themselves.
    exact = [
        (rows[first : first + _CHUNK].double() - training_rows[index[first : first + _CHUNK]].double()).norm(dim=1)
        for first in range(0, len(rows), _CHUNK)
    ]
    return torch.cat(exact), index

"""Memorisation: whether samples are copies of training images, by their nearest neighbours in feature space."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evaluation.metrics.distances import distance_blocks
from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_pair, check_rows
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import Tensor

_NAMES = ("rows", "training rows")
_CHUNK = 4096  # rows in float64 at a time
_SHOWN = 10  # samples in the picture


def nearest(rows: Tensor, training_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Euclidean distance float64 [N], index int64 [N]) of the training row nearest to each row; 0 for an exact copy.

    Args:
        rows, training_rows: features [N, D] and [M, D] on one device.

    Raises:
        ArgumentError: numbers of features differ, a set is empty, or rows are not finite.
    """
    check_pair(rows, training_rows, _NAMES)
    return _nearest(rows, training_rows, None)


def authenticity(rows: Tensor, training_rows: Tensor) -> Score:
    """The share of samples that are further from their nearest training row than that row is from its own nearest.

    Alaa et al. 2022, arXiv 2102.08921, section 4.2. Copies score 0, samples far from all training images score 1. New
    images of the same distribution score the chance that two neighbours are not each other's nearest: 1/3 in one
    dimension, 0.38 in two, towards 1/2 in many. Compare with the score of held-out images.

    Returns:
        The share with its binomial standard error.

    Raises:
        ArgumentError: as `nearest`, or there are fewer than two training rows.
    """
    check_pair(rows, training_rows, _NAMES)
    check_rows(training_rows, "training rows", more_than=1, why="the nearest one must have a neighbour")
    distance, index = _nearest(rows, training_rows, None)
    met, where = index.unique(return_inverse=True)
    of_training, _ = _nearest(training_rows[met], training_rows, met)
    return binomial_score((distance > of_training[where]).double().mean().item(), len(rows))


def _nearest(rows: Tensor, training_rows: Tensor, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """`nearest`, but training row excluded[i] does not count as a neighbour of row i."""
    import torch

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


def authenticity_metric(features: str) -> Metric:
    """Authenticity in these features; the reference must be the training images."""

    def compute(measured: Measured) -> dict[str, Score]:
        return {"authenticity": authenticity(*measured.on_device(features))}

    def picture(measured: Measured) -> PILImage | None:
        """The ten samples nearest to a training image, each above that image."""
        import torch

        from fdistill.base.images import grid

        if measured.reference_images is None:
            return None
        distances, neighbours = nearest(*measured.on_device(features))
        closest = distances.argsort()[:_SHOWN]
        samples = measured.images.read(closest.tolist())
        training = measured.reference_images.read(neighbours[closest].tolist())
        pairs = torch.cat([samples, training], dim=2)  # in one cell, however many of them fit in a row
        return grid(pairs, columns=len(closest))

    return Metric(
        name="authenticity",
        outputs=("authenticity",),
        higher_is_better=True,
        compute=compute,
        features=(features,),
        min_samples=lambda width: 2,
        against="rows",
        picture=picture,
    )

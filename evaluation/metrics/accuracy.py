"""Share of images that a classifier puts into the class they were asked to be of."""

from __future__ import annotations

from torch import Tensor

from evaluation.metrics.rows import check_rows
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score
from fdistill.base.errors import ArgumentError


def accuracy(logits: Tensor, labels: Tensor) -> Score:
    """Share of rows whose largest logit is the label's, with its binomial standard error.

    Args:
        logits: [N, K].
        labels: int64 [N] in 0 .. K - 1.

    Raises:
        ArgumentError: no images, shapes differ, labels out of range, NaN or infinite logits.
    """
    check_rows(logits, "logits")
    if labels.shape != (len(logits),) or labels.is_floating_point():
        raise ArgumentError(
            f"labels: expected integers [{len(logits)}], one for each image, got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ArgumentError(
            f"labels: expected 0 to {logits.shape[1] - 1} for a classifier of {logits.shape[1]} classes, "
            f"got {labels.min()} to {labels.max()}"
        )
    right = logits.argmax(dim=1) == labels.to(logits.device)
    return binomial_score(right.double().mean().item(), len(logits))

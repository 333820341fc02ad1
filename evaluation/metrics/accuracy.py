"""Class accuracy: the share of images that a classifier assigns to the class they were generated for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_rows
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> Score:
    """The share of rows whose largest logit is at the label, with its binomial standard error.

    Args:
        logits: [N, K].
        labels: int64 [N] in [0, K).

    Raises:
        ArgumentError: there are no images, shapes differ, labels are out of range, or logits are not finite.
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


def class_accuracy_metric(logits: str) -> Metric:
    """Accuracy of the classifier whose logits [N, K] are the features `logits`."""

    def compute(measured: Measured) -> dict[str, Score]:
        assert measured.images.labels is not None
        return {"class_accuracy": accuracy(measured.samples[logits], measured.images.labels)}

    return Metric(
        name="class_accuracy",
        outputs=("class_accuracy",),
        higher_is_better=True,
        compute=compute,
        features=(logits,),
        needs="labels",
    )

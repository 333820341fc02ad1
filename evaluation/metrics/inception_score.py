"""Inception Score, by torch-fidelity's function."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_rows
from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


def inception_score(logits: Tensor, *, splits: int = 10, shuffled: bool = True, seed: int = 2020) -> Score:
    """exp(mean KL(p(class | image) || p(class))) of each split of the images, then the mean over splits.

    Salimans et al. 2016, arXiv 1606.03498. In [1, K]: 1 if all images are alike or the classifier is unsure of all, K
    if it is sure of all and all classes are equally frequent.

    Args:
        logits: [N, K] before the softmax, of any float dtype; computed in float64.
        splits: number of parts of equal size, at least 1.
        shuffled: whether images are shuffled before they are split; False keeps their order, as ADM does.
        seed: of the shuffling.

    Returns:
        The mean over splits, and the standard deviation over splits, which papers publish beside it.

    Raises:
        ArgumentError: there are fewer images than splits, or logits are not finite or so far apart that probabilities
            vanish in float64.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if splits < 1:
        raise ArgumentError(f"splits: expected at least 1, got {splits}")
    check_rows(logits, "logits", more_than=splits - 1, why=f"each of {splits} splits needs one")
    found = isc_features_to_metric(logits.detach().cpu(), splits=splits, shuffle=shuffled, rng_seed=seed)
    value, spread = float(found[KEY_METRIC_ISC_MEAN]), float(found[KEY_METRIC_ISC_STD])
    if not math.isfinite(value):
        raise ArgumentError(
            "logits: a class has probability 0 in float64 for all images of a split; expected logits that differ by "
            "less than 700: give the network's output before the softmax, not scaled"
        )
    return Score(value, spread if splits > 1 else None, f"{splits} splits")


def in_runs(labels: Tensor) -> bool:
    """Whether labels int64 [N] lie together: neighbours differ less than half as often as in random order."""
    frequencies = labels.bincount().double() / len(labels)
    expected = (len(labels) - 1) * (1 - float((frequencies**2).sum()))
    return int((labels[1:] != labels[:-1]).sum()) < expected / 2


def inception_score_metric(logits: str, *, shuffled: bool = True) -> Metric:
    """The score over ten splits of the features `logits`."""

    def compute(measured: Measured) -> dict[str, Score]:
        if not shuffled and measured.images.labels is not None and in_runs(measured.images.labels):
            warnings.warn(
                f"{measured.images.name}: images lie class by class, and this protocol's inception_score is the mean "
                "over ten stretches of them in their order, each of which then has few classes and a score that is too "
                "low; number the files in random order, or measure inception_score by protocol folder, which shuffles",
                stacklevel=2,
            )
        return {"inception_score": inception_score(measured.samples[logits], shuffled=shuffled)}

    return Metric(
        name="inception_score",
        outputs=("inception_score",),
        higher_is_better=True,
        compute=compute,
        features=(logits,),
        min_samples=lambda width: 10,
    )

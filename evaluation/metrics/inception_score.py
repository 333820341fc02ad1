"""Inception Score by torch-fidelity's function."""

from __future__ import annotations

import math

from torch import Tensor

from evaluation.metrics.rows import check_rows
from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError


def inception_score(logits: Tensor, *, splits: int = 10, shuffled: bool = True, seed: int = 2020) -> Score:
    """exp(mean KL(p(class | image) || p(class))), the mean over splits of shuffled images (Salimans et al. 2016).

    See arXiv 1606.03498. From 1 (all images alike, or all unsure) to K (sure, and all classes as frequent).

    Args:
        logits: [N, K] before the softmax; of any float dtype, computed in float64.
        shuffled: False for splits of images in their order, as ADM has them.

    Returns:
        The mean over splits, and its standard deviation, which is what is published.

    Raises:
        ArgumentError: fewer images than splits; NaN or infinite logits, or such that probabilities vanish in float64.
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

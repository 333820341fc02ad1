"""Kernel distance (KID), by torch-fidelity's estimator in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_pair
from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


def kernel_distance(
    rows: Tensor, reference_rows: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Score:
    """The mean over random subsets of the unbiased squared MMD with kernel (x.y / D + 1)^3.

    Binkowski et al. 2018, arXiv 1801.01401. Subsets and result are those of torch-fidelity's `kid_features_to_metric`
    with the same seed, but only the rows in use are converted to float64. A value slightly below zero is valid.

    Args:
        rows, reference_rows: features [N, D] of generated and [M, D] of real images.
        subsets, subset_size: how many subsets, and how many rows of each set are in one.
        seed: which subsets are drawn.

    Returns:
        The mean, and the standard deviation over subsets, which papers publish beside it; no spread if every subset is
        the whole of both sets.

    Raises:
        ArgumentError: there are fewer rows than subset_size, numbers of features differ, or rows are not finite.
    """
    from torch_fidelity.metric_kid import kernel_mmd

    if subset_size < 2 or subsets < 1:
        raise ArgumentError(
            f"subset_size, subsets: expected at least 2 rows and 1 subset, got {subset_size} and {subsets}"
        )
    check_pair(rows, reference_rows, more_than=subset_size - 1, why=f"each subset has {subset_size}")
    generator = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        first, second = (
            values[generator.choice(len(values), subset_size, replace=False)].double().cpu().numpy()
            for values in (rows, reference_rows)
        )
        found.append(
            kernel_mmd(
                first,
                second,
                kid_kernel="poly",
                kid_kernel_poly_degree=3,
                kid_kernel_poly_gamma=None,  # 1 / D
                kid_kernel_poly_coef0=1.0,
            )
        )
    whole = subset_size == len(rows) == len(reference_rows)
    return Score(float(np.mean(found)), None if whole else float(np.std(found)), f"{subsets} subsets of {subset_size}")


def kernel_distance_metric(name: str, features: str) -> Metric:
    """The distance in these features, over 100 subsets of 1,000. Call it "kid" in Inception's pool features."""

    def compute(measured: Measured) -> dict[str, Score]:
        return {name: kernel_distance(measured.samples[features], measured.reference[features])}

    return Metric(
        name=name,
        outputs=(name,),
        higher_is_better=False,
        compute=compute,
        features=(features,),
        min_samples=lambda width: 1000,
        against="rows",
    )

"""Kernel distance (KID) by torch-fidelity's estimator, in float64."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from evaluation.metrics.rows import check_pair
from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError


def kernel_distance(
    rows: Tensor, reference_rows: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Score:
    """Mean over random subsets of the unbiased squared MMD with kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    See arXiv 1801.01401. The subsets are those of torch-fidelity's `kid_features_to_metric` with the same seed, and so
    is the number; only the rows in use are float64. A value slightly below zero is valid.

    Returns:
        The mean, and the standard deviation over subsets, which is what is published; None where subsets are the sets.

    Raises:
        ArgumentError: fewer rows than subset_size, widths differ, NaN or infinite rows.
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

"""Precision and recall by torch-fidelity's function."""

from __future__ import annotations

from torch import Tensor

from evaluation.metrics.rows import check_pair
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score
from fdistill.base.errors import ArgumentError

_BLOCK = 1 << 26  # float32 distances at a time: 256 MB, of which torch-fidelity holds up to four copies


def precision_recall(rows: Tensor, reference_rows: Tensor, neighbours: int = 3) -> tuple[Score, Score]:
    """(share of samples inside the reference's manifold, share of the reference inside the samples'), each in [0, 1].

    A set's manifold is the union of balls around its rows, each reaching its k-th nearest other row
    (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    torch-fidelity takes float32 distances by |x|^2 + |y|^2 - 2 x.y, which is useless under a large common offset; rows
    are therefore centred on the reference's mean first, which changes no distance.

    Args:
        rows, reference_rows: [N, D] and [M, D], generated and real, on one device.
        neighbours: k; both sets must be larger.

    Returns:
        Both with their binomial standard errors, which take the other set's manifold as given.

    Raises:
        ArgumentError: widths differ, too few rows, NaN or infinite rows.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if neighbours < 1:
        raise ArgumentError(f"neighbours: expected at least 1, got {neighbours}")
    check_pair(rows, reference_rows, more_than=neighbours, why=f"each needs {neighbours} neighbours")
    origin = reference_rows.float().mean(0)
    found = prc_features_to_metric(
        rows.float() - origin,
        reference_rows.float() - origin,
        prc_neighborhood=neighbours,
        prc_batch_size=max(1, _BLOCK // max(len(rows), len(reference_rows))),
        save_cpu_ram=True,
        verbose=False,
    )
    return (
        binomial_score(float(found[KEY_METRIC_PRECISION]), len(rows)),
        binomial_score(float(found[KEY_METRIC_RECALL]), len(reference_rows)),
    )

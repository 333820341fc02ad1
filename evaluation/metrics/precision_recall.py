"""Precision and recall, by torch-fidelity's function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_pair
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 26  # float32 distances at a time: 256 MB, of which torch-fidelity holds up to four copies


def precision_recall(rows: Tensor, reference_rows: Tensor, neighbours: int = 3) -> tuple[Score, Score]:
    """(share of samples inside the reference's manifold, share of the reference inside the samples'), each in [0, 1].

    A set's manifold is the union of balls around its rows, each of which reaches to the row's k-th nearest other row
    (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    torch-fidelity computes float32 distances as |x|^2 + |y|^2 - 2 x.y, which loses all digits if the features have a
    large common offset. Rows are therefore centred on the reference's mean first, which changes no distance.

    Args:
        rows, reference_rows: features [N, D] of generated and [M, D] of real images, on one device.
        neighbours: k, at least 1 and smaller than N and M.

    Returns:
        Both with their binomial standard errors, for which the other set's manifold is taken as exact.

    Raises:
        ArgumentError: numbers of features differ, there are too few rows, or rows are not finite.
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


def precision_recall_metric(features: str) -> Metric:
    """Precision and recall in these features."""

    def compute(measured: Measured) -> dict[str, Score]:
        precision, recall = precision_recall(*measured.on_device(features))
        return {"precision": precision, "recall": recall}

    return Metric(
        name="precision_recall",
        outputs=("precision", "recall"),
        higher_is_better=True,
        compute=compute,
        features=(features,),
        min_samples=lambda width: 4,
        against="rows",
    )

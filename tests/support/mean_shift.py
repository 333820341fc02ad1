"""Mean shift: how far the mean of the samples' features is from the mean of the reference's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_rows
from evaluation.metrics.score import Score

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.metrics.moments import Moments


def mean_shift(rows: Tensor, reference: Moments) -> Score:
    """The Euclidean distance between the mean of rows [N, D] and the reference's mean [D].

    Raises:
        ArgumentError: there are no rows, or rows are not finite.
    """
    check_rows(rows)
    return Score((rows.double().mean(dim=0) - reference.mean).norm().item())


def mean_shift_metric(name: str, features: str) -> Metric:
    """The shift in these features, under the name `name`."""

    def compute(measured: Measured) -> dict[str, Score]:
        return {name: mean_shift(measured.samples[features], measured.moments[features])}

    return Metric(
        name=name,
        outputs=(name,),
        higher_is_better=False,
        compute=compute,
        features=(features,),
        against="moments",
    )

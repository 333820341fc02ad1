"""Frechet distance between Gaussians fitted to two sets of features: FID, FD-DINOv2 and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.metrics.moments import Moments


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    With S1 = F1 F1^T and S2 = F2 F2^T, tr (S1 S2)^(1/2) is the sum of the singular values of F2^T F1. The textbook way,
    square roots of the eigenvalues of S1 S2, would turn rounding errors of 1e-16 into errors of 1e-8 in each direction
    without variance.

    A covariance has no eigenvalues below zero; small ones that rounding made count as zero.

    Raises:
        ArgumentError: numbers of features differ, either side has no more rows than features, or a covariance has
            eigenvalues so far below zero that rounding does not explain them.
    """
    import torch

    _check(samples, reference)
    first, second = samples.covariance, reference.covariance
    overlap = torch.linalg.svdvals(_factor(second, "reference").T @ _factor(first, "samples")).sum()
    shift = samples.mean - reference.mean
    return float(shift @ shift + first.trace() + second.trace() - 2 * overlap)


def frechet_score(
    rows: Tensor, reference: Moments, *, replicates: int = 20, seed: int = 0, strata: Tensor | None = None
) -> Score:
    """The distance of rows [N, D] to the reference, and how much it would vary with other samples.

    The spread is the standard deviation over bootstrap replicates, in which the rows are drawn anew with replacement
    and the reference stays as it is. It is accurate far from the reference, and too large near it: by a factor of up
    to 1.8 (sqrt(3) to first order) where the distance is only the noise of N rows. The value has the bias of N rows
    once and every replicate has it twice, so the mean of the replicates is not used.

    If every set of samples has the same number of each class, sets vary less, and the replicates must keep these
    numbers too (`strata`). Measured on a student of the digits: 0.026 to 0.039 with strata, 0.13 without, and 0.028
    over twelve seeds.

    Args:
        replicates: 0 for no spread, else at least 2. Each takes about as long as the covariance of the rows.
        seed: which replicates are drawn.
        strata: int64 [N], the class of each row, if every set has the same number of each class; else None.

    Raises:
        ArgumentError: as `frechet_distance`, or rows are not finite.
    """
    import torch

    from evaluation.metrics.moments import Moments

    if replicates < 0 or replicates == 1:
        raise ArgumentError(f"replicates: expected 0 for no spread, or at least 2, got {replicates}")
    value = frechet_distance(Moments.of(rows), reference)
    if not replicates:
        return Score(value)
    distance, generator = distance_to(reference), np.random.default_rng(seed)
    found = []
    labels = np.zeros(len(rows), np.int64) if strata is None else strata.numpy()
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(replicates):
        drawn = np.concatenate([group[generator.integers(len(group), size=len(group))] for group in groups])
        counts = np.bincount(drawn, minlength=len(rows))
        found.append(distance(Moments.of(rows, torch.from_numpy(counts))))
    within = "" if strata is None else " within classes"
    return Score(value, float(np.std(found, ddof=1)), f"{replicates} bootstrap replicates{within}")


def distance_to(reference: Moments) -> Callable[[Moments], float]:
    """A function that computes `frechet_distance` to one reference, four times as fast, for a spread or a fit.

    It uses the eigenvalues of F2^T S1 F2, with F2 computed once. In each direction without variance this is exact to
    about 1e-8 of the largest variance. The samples' moments are not checked.
    """
    import torch

    covariance = reference.covariance
    factor, trace = _factor(covariance, "reference"), covariance.trace()

    def distance(samples: Moments) -> float:
        covariance, shift = samples.covariance, samples.mean - reference.mean
        squares = torch.linalg.eigvalsh(factor.T @ covariance @ factor)
        return float(shift @ shift + covariance.trace() + trace - 2 * squares.clamp(min=0).sqrt().sum())

    return distance


def _check(samples: Moments, reference: Moments) -> None:
    if samples.width != reference.width:
        raise ArgumentError(
            f"samples, reference: expected the same number of features, got {samples.width} and {reference.width}; "
            "the reference was made with another extractor"
        )
    for name, moments in (("samples", samples), ("reference", reference)):
        if moments.count is not None and moments.count <= moments.width:
            raise ArgumentError(
                f"{name}: expected more than {moments.width} rows, as no more than features give a singular covariance "
                f"and a distance that mostly measures their number; got {moments.count}: give more images"
            )


def _factor(covariance: Tensor, name: str) -> Tensor:
    """F [D, D] with F F^T = covariance."""
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-4 * values[-1].abs():
        raise ArgumentError(
            f"{name}: its covariance has an eigenvalue of {values[0]:.3g} beside a largest of {values[-1]:.3g}; "
            "expected none below zero: this is not a covariance matrix, make the statistics anew"
        )
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor


def frechet_metric(name: str, features: str) -> Metric:
    """The distance in these features. Call it "fid" in Inception's pool features, and in no others."""

    def compute(measured: Measured) -> dict[str, Score]:
        rows, moments = measured.samples[features], measured.moments[features]
        return {name: frechet_score(rows, moments, replicates=measured.replicates, strata=measured.strata)}

    return Metric(
        name=name,
        outputs=(name,),
        higher_is_better=False,
        compute=compute,
        features=(features,),
        min_samples=lambda width: width + 1,
        against="moments",
    )

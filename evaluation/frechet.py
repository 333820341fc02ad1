"""Frechet distance between two feature sets, by torch-fidelity's float64 statistics (no matrix square root)."""

from __future__ import annotations

from torch import Tensor

from fdistill.errors import ArgumentError


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with unbiased covariances (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        features, reference: [N, D] and [M, D], computed in float64 whatever their dtype.

    Raises:
        ArgumentError: widths differ, or a set has no more samples than features, so that its covariance is singular.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ArgumentError(
            f"features: expected [N, D] and [M, D], got {tuple(features.shape)} and {tuple(reference.shape)}"
        )
    for name, values in (("features", features), ("reference", reference)):
        if len(values) <= values.shape[1]:
            raise ArgumentError(
                f"{name}: {len(values)} samples of {values.shape[1]} features give a singular covariance; "
                f"expected more than {values.shape[1]} samples"
            )
    statistics = [fid_features_to_statistics(values.double().cpu()) for values in (features, reference)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])

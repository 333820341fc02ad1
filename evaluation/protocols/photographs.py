"""The metrics that all protocols of photographs offer."""

from __future__ import annotations

from evaluation.metrics.density_coverage import density_coverage_metric
from evaluation.metrics.diversity import lpips_diversity_metric
from evaluation.metrics.fid_infinity import frechet_infinity_metric
from evaluation.metrics.frechet import frechet_metric
from evaluation.metrics.inception_score import inception_score_metric
from evaluation.metrics.kernel_distance import kernel_distance_metric
from evaluation.metrics.memorisation import authenticity_metric
from evaluation.metrics.metric import Metric
from evaluation.metrics.precision_recall import precision_recall_metric


def photograph_metrics(extractor: str = "inception", *, shuffled: bool = True) -> tuple[Metric, ...]:
    """Metrics of Inception's features, Frechet distances in DINOv2's and CLIP's features, and diversity by LPIPS.

    Args:
        extractor: "inception", which resizes as TensorFlow 1 does, or "inception-clean", which resizes as clean-fid.
        shuffled: whether the samples are shuffled before the Inception Score splits them.
    """
    pool = f"{extractor}.pool"
    return (
        frechet_metric("fid", pool),
        frechet_infinity_metric("fid_infinity", pool),
        kernel_distance_metric("kid", pool),
        inception_score_metric(f"{extractor}.logits", shuffled=shuffled),
        precision_recall_metric(pool),
        density_coverage_metric(pool),
        authenticity_metric(pool),
        frechet_metric("fd_dinov2", "dinov2.cls"),
        frechet_metric("fd_clip", "clip-b32.image"),
        lpips_diversity_metric(),
    )

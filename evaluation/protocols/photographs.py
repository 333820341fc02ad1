"""What the protocols of photographs have in common: the metrics that published extractors allow."""

from __future__ import annotations

from evaluation.metric import (
    Metric,
    density_and_coverage,
    frechet,
    inception,
    infinity,
    kid,
    lpips_diversity,
    memorisation,
    precision_and_recall,
)


def photograph_metrics(extractor: str = "inception", *, shuffled: bool = True) -> tuple[Metric, ...]:
    """Those of Inception's features, and the Frechet distances of DINOv2's and CLIP's beside them.

    Args:
        extractor: "inception", which resizes as TensorFlow 1 did, or "inception-clean", as clean-fid does.
        shuffled: whether the Inception Score's splits are of shuffled samples.
    """
    pool = f"{extractor}.pool"
    return (
        frechet("fid", pool),
        infinity("fid_infinity", pool),
        kid("kid", pool),
        inception(f"{extractor}.logits", shuffled=shuffled),
        precision_and_recall(pool),
        density_and_coverage(pool),
        memorisation(pool),
        frechet("fd_dinov2", "dinov2.cls"),
        frechet("fd_clip", "clip-b32.image"),
        lpips_diversity(),
    )

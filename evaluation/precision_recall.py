"""Precision and recall of a generated feature set against a real one, by torch-fidelity's manifold estimate."""

from __future__ import annotations

from torch import Tensor

from fdistill.errors import ArgumentError


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """(share of generated samples inside the real manifold, share of real ones inside the generated one), in [0, 1].

    A set's manifold is the union of balls around its samples, each reaching its k-th nearest neighbour
    (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    Args:
        features, reference: [N, D] and [M, D], generated and real.
        neighbours: k; both sets must be larger.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(features), len(reference)) <= neighbours:
        raise ArgumentError(
            f"features, reference: expected more than {neighbours} samples, got {len(features)} and {len(reference)}"
        )
    scores = prc_features_to_metric(
        features, reference, prc_neighborhood=neighbours, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
    )
    return float(scores[KEY_METRIC_PRECISION]), float(scores[KEY_METRIC_RECALL])

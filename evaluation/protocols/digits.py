"""`digits`: 1,797 generated 8x8 digits against the 1,797 real ones, in the features of the embedded digit network.

Its distance is called fd_digits, never FID: the extractor is not Inception and the numbers do not compare.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evaluation.digit_features import extract, load_digit_features, weights_sha256
from evaluation.frechet import frechet_distance
from evaluation.precision_recall import precision_recall
from evaluation.protocols.protocol import Protocol
from fdistill.data.digits import load_digits


def _score(images: Tensor, labels: Tensor | None, reference: Tensor, metrics: tuple[str, ...]) -> dict[str, float]:
    network = load_digit_features()
    features, classes = extract(network, images)
    real_features, _ = extract(network, reference)
    scores: dict[str, float] = {}
    if "fd_digits" in metrics:
        scores["fd_digits"] = frechet_distance(features, real_features)
    if "precision" in metrics or "recall" in metrics:
        precision, recall = precision_recall(features, real_features)
        scores.update({"precision": precision, "recall": recall})
    if "class_accuracy" in metrics and labels is not None:
        scores["class_accuracy"] = (classes == labels).double().mean().item()
    return {name: scores[name] for name in metrics if name in scores}


def _provenance() -> dict[str, Any]:
    return {
        "extractor": "digits-features (embedded)",
        "extractor_sha256": weights_sha256(),
        "resize": "none",
        "dtype": "float32 features, float64 statistics",
    }


DIGITS = Protocol(
    name="digits",
    num_samples=1797,
    sample_shape=(1, 8, 8),
    metrics=("fd_digits", "precision", "recall", "class_accuracy"),
    needs_labels=("class_accuracy",),
    reference="digits",
    load_reference=lambda: load_digits()[0],
    score=_score,
    provenance=_provenance,
)

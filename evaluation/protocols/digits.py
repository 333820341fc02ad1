"""`digits`: 1,797 generated 8x8 digits against the 1,797 real ones, in the features of the embedded digit network.

Its distance is called fd_digits, never FID: the extractor is not Inception and the numbers do not compare.
"""

from __future__ import annotations

from evaluation.metric import (
    class_accuracy,
    density_and_coverage,
    feature_diversity,
    frechet,
    infinity,
    kid,
    memorisation,
    precision_and_recall,
)
from evaluation.protocols.protocol import Protocol

_FEATURES = "digits.features"

DIGITS = Protocol(
    name="digits",
    metrics=(
        frechet("fd_digits", _FEATURES),
        precision_and_recall(_FEATURES),
        class_accuracy("digits.logits"),
        kid("kid_digits", _FEATURES),
        density_and_coverage(_FEATURES),
        feature_diversity("diversity_digits", _FEATURES),
        memorisation(_FEATURES),
        infinity("fd_digits_infinity", _FEATURES),
    ),
    default=("fd_digits", "precision", "recall", "class_accuracy"),
    num_samples=1797,
    num_classes=10,
    channels=1,
    size=8,
    reference="the 1,797 embedded digits",
    embedded="digits",
    reference_count=1797,
)

"""`digits`: 1,797 generated 8x8 digits against the 1,797 real ones, in the features of the embedded digit network.

Its Frechet distance is called fd_digits and never FID: the features are not Inception's, so the numbers do not compare.
"""

from __future__ import annotations

from evaluation.metrics.accuracy import class_accuracy_metric
from evaluation.metrics.density_coverage import density_coverage_metric
from evaluation.metrics.diversity import feature_diversity_metric
from evaluation.metrics.fid_infinity import frechet_infinity_metric
from evaluation.metrics.frechet import frechet_metric
from evaluation.metrics.kernel_distance import kernel_distance_metric
from evaluation.metrics.memorisation import authenticity_metric
from evaluation.metrics.precision_recall import precision_recall_metric
from evaluation.protocols.protocol import Protocol

_FEATURES = "digits.features"

DIGITS = Protocol(
    name="digits",
    metrics=(
        frechet_metric("fd_digits", _FEATURES),
        precision_recall_metric(_FEATURES),
        class_accuracy_metric("digits.logits"),
        kernel_distance_metric("kid_digits", _FEATURES),
        density_coverage_metric(_FEATURES),
        feature_diversity_metric("diversity_digits", _FEATURES),
        authenticity_metric(_FEATURES),
        frechet_infinity_metric("fd_digits_infinity", _FEATURES),
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

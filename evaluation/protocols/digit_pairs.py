"""`digit-pairs`: 500 pairs of digits generated from captions. Does an image show both digits that its caption names,
each where the caption puts it?

The digit network sees the halves of the 16x16 images. The distance of both halves' features together is called
fd_pairs, never FID.
"""

from __future__ import annotations

from evaluation.metrics.digit_pairs import pair_metrics
from evaluation.metrics.diversity import feature_diversity_metric
from evaluation.metrics.frechet import frechet_metric
from evaluation.protocols.protocol import Protocol

_FEATURES = "digit-pairs.features"


def _prompts() -> list[str]:
    from fdistill.data.digit_pairs import pair_evaluation_prompts

    return [prompt.text for prompt in pair_evaluation_prompts()]


DIGIT_PAIRS = Protocol(
    name="digit-pairs",
    metrics=(
        *pair_metrics("digit-pairs.left", "digit-pairs.right"),
        frechet_metric("fd_pairs", _FEATURES),
        feature_diversity_metric("diversity_pairs", _FEATURES),
    ),
    default=("pair_accuracy", "exchanged", "fd_pairs"),
    num_samples=500,
    size=16,
    reference="the 5,000 digit pairs",
    embedded="digit-pairs",
    reference_count=5000,
    prompts=_prompts,
)

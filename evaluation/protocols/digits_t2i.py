"""`digits-t2i`: 500 digits generated from captions. Does an image show the digit that its caption names, is a bold one
bolder than a thin one, and how well does it match its caption by the embedded CLIP model of digits?

The digit network sees 8x8 box averages of the 16x16 images. Its distance is called fd_digits, never FID.
"""

from __future__ import annotations

from evaluation.metrics.clip_score import clip_cosine_metric
from evaluation.metrics.density_coverage import density_coverage_metric
from evaluation.metrics.digit_prompts import ink_metric, prompt_accuracy_metric
from evaluation.metrics.diversity import feature_diversity_metric
from evaluation.metrics.frechet import frechet_metric
from evaluation.protocols.protocol import Protocol

_FEATURES = "digits-captioned.features"


def _prompts() -> list[str]:
    from fdistill.data.digit_captions import evaluation_prompts

    return [prompt.text for prompt in evaluation_prompts()]


DIGITS_T2I = Protocol(
    name="digits-t2i",
    metrics=(
        prompt_accuracy_metric("digits-captioned.logits"),
        ink_metric("digits-captioned.ink"),
        frechet_metric("fd_digits", _FEATURES),
        clip_cosine_metric("clip_digits", "clip-digits"),
        density_coverage_metric(_FEATURES),
        feature_diversity_metric("diversity_digits", _FEATURES),
    ),
    default=("prompt_accuracy", "ink_bold", "ink_thin", "fd_digits", "clip_digits"),
    num_samples=500,
    size=16,
    reference="the 1,797 captioned digits",
    embedded="digit-captions",
    reference_count=1797,
    prompts=_prompts,
)

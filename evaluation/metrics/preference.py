"""Preference scores: how much people would like an image for its prompt, by a model that learnt from their choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_prompts
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import mean_score

if TYPE_CHECKING:
    from torch import Tensor


def preference_score(image_features: Tensor, text_features: Tensor) -> Score:
    """The mean product of an image's features and its prompt's, in float64, with its standard error.

    Args:
        image_features, text_features: [N, D], scaled as `evaluation.extractors.preference` makes them; row i of both is
            image i.

    Raises:
        ArgumentError: shapes differ, there are no images, or a row is not finite.
    """
    check_prompts(image_features, text_features)
    return mean_score((image_features.double() * text_features.double()).sum(dim=1))


def preference_metric(name: str, model: str) -> Metric:
    """The score of a model in `evaluation.extractors.TEXT_IMAGE_MODELS`, under the name `name`."""
    image, text = f"{model}.image", f"{model}.text"

    def compute(measured: Measured) -> dict[str, Score]:
        return {name: preference_score(measured.samples[image], measured.samples[text])}

    return Metric(
        name=name,
        outputs=(name,),
        higher_is_better=True,
        compute=compute,
        features=(image,),
        needs="prompts",
        clip=(model, ""),
    )

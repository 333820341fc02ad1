"""Likeness of images and their prompts in a CLIP model, under the three names by which it is published."""

from __future__ import annotations

from torch import Tensor

from evaluation.metrics.rows import check_pair
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import mean_score
from fdistill.base.errors import ArgumentError


def clip_scores(image_features: Tensor, text_features: Tensor) -> dict[str, Score]:
    """Means over images of the cosine with their own prompt, in float64, with standard errors of the means.

    Args:
        image_features, text_features: [N, D], as the encoders give them (not normalised).

    Returns:
        "clip_cosine": mean of cos, as DMD2 reports; "clip_x100": max(mean of 100 cos, 0), as torchmetrics;
        "clipscore": mean of 2.5 max(cos, 0) (Hessel et al. 2021, arXiv 2104.08718, eq. 1).

    Raises:
        ArgumentError: shapes differ, no images, a row that is not finite or is zero.
    """
    check_pair(image_features, text_features, ("image_features", "text_features"))
    if len(image_features) != len(text_features):
        raise ArgumentError(
            f"image_features, text_features: expected one prompt for each image, got {len(image_features)} images and "
            f"{len(text_features)} prompts"
        )
    image, text = image_features.detach().double().cpu(), text_features.detach().double().cpu()
    norms = image.norm(dim=1) * text.norm(dim=1)
    if not norms.all():
        raise ArgumentError(
            f"image_features, text_features: row {int((norms == 0).nonzero()[0])} is zero and has no direction; "
            "look at that image and prompt, and at the model's weights"
        )
    cosine = (image * text).sum(dim=1) / norms
    x100 = mean_score(cosine, 100)
    return {
        "clip_cosine": mean_score(cosine),
        "clip_x100": Score(max(x100.value, 0.0), x100.spread, x100.spread_of),
        "clipscore": mean_score(cosine.clamp(min=0), 2.5),
    }

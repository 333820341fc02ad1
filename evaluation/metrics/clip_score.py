"""CLIP scores: how well images match their prompts, as the three numbers that are published under this name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.rows import check_prompts
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import mean_score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


def clip_scores(image_features: Tensor, text_features: Tensor) -> dict[str, Score]:
    """Means over images of their cosine similarity with their own prompts, in float64, with standard errors.

    Args:
        image_features, text_features: [N, D], as the encoders return them (not normalised); row i of both is image i.

    Returns:
        "clip_cosine": mean of cos, as DMD2 reports; "clip_x100": max(mean of 100 cos, 0), as torchmetrics;
        "clipscore": mean of 2.5 max(cos, 0) (Hessel et al. 2021, arXiv 2104.08718, eq. 1).

    Raises:
        ArgumentError: shapes differ, there are no images, or a row is zero or not finite.
    """
    check_prompts(image_features, text_features)
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


def clip_metric(model: str, prefix: str = "") -> Metric:
    """All three numbers by one CLIP model.

    Args:
        model: a name in `evaluation.extractors.clip.CLIP_MODELS`, with "@view" behind it for a view of the images.
        prefix: text put before each prompt, as "A photo depicts ".
    """
    image, text = f"{model}.image", f"{model}.text"

    def compute(measured: Measured) -> dict[str, Score]:
        return clip_scores(measured.samples[image], measured.samples[text])

    return Metric(
        name="clip",
        outputs=("clip_cosine", "clip_x100", "clipscore"),
        higher_is_better=True,
        compute=compute,
        features=(image,),
        needs="prompts",
        clip=(model, prefix),
    )


def clip_cosine_metric(name: str, model: str) -> Metric:
    """The mean cosine alone under the name `name`, for models whose scores must not be taken for published CLIP scores.

    Args:
        model: as in `clip_metric`.
    """
    clip = clip_metric(model)
    return replace(
        clip,
        name=name,
        outputs=(name,),
        compute=lambda measured: {name: clip.compute(measured)["clip_cosine"]},
    )

"""Preference scores: how much people would like an image for its prompt, by a model that learnt from their choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.pairs import pairs_picture
from evaluation.metrics.rows import check_prompts
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import mean_score

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import Tensor

_AT_ONCE = 32  # images in one pass of ImageReward


def preference_score(image_features: Tensor, text_features: Tensor) -> Score:
    """The mean product of an image's features and its prompt's, in float64, with its standard error.

    Args:
        image_features, text_features: [N, D], scaled as `evaluation.extractors.preference` makes them; row i of both is
            image i.

    Raises:
        ArgumentError: shapes differ, there are no images, or a row is not finite.
    """
    check_prompts(image_features, text_features)
    return mean_score(_scores(image_features, text_features))


def _scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    return (image_features.double() * text_features.double()).sum(dim=1)


def preference_metric(name: str, model: str) -> Metric:
    """The score of a model in `evaluation.extractors.TEXT_IMAGE_MODELS`, under the name `name`."""
    image, text = f"{model}.image", f"{model}.text"

    def compute(measured: Measured) -> dict[str, Score]:
        return {name: preference_score(measured.samples[image], measured.samples[text])}

    def picture(measured: Measured) -> PILImage | None:
        return pairs_picture(_scores(measured.samples[image], measured.samples[text]), measured)

    return Metric(
        name=name,
        outputs=(name,),
        higher_is_better=True,
        compute=compute,
        features=(image,),
        needs="prompts",
        clip=(model, ""),
        picture=picture,
    )


def image_reward_metric() -> Metric:
    """ImageReward of each image for its prompt, in float64, with the standard error of the mean."""

    def compute(measured: Measured) -> dict[str, Score]:
        import torch

        from evaluation.extractors.image_reward import open_image_reward

        network, images = open_image_reward(measured.device, measured.weights), measured.images
        prompts = images.prompts or []
        parts = (range(len(images))[first : first + _AT_ONCE] for first in range(0, len(images), _AT_ONCE))
        rewards = [network(images.read(part), [prompts[i] for i in part]) for part in parts]
        return {"imagereward": mean_score(torch.cat(rewards).double())}

    return Metric(
        name="imagereward",
        outputs=("imagereward",),
        higher_is_better=True,
        compute=compute,
        needs="prompts",
        files=("imagereward", "bert-vocab"),
    )

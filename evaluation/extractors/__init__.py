"""Feature networks, one per file, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from evaluation.extractors.clip import CLIP_MODELS, ClipModel, open_clip_model
from evaluation.extractors.digits import open_captioned_digits, open_digit_pairs, open_digits
from evaluation.extractors.dinov2 import open_dinov2
from evaluation.extractors.extractor import Extractor, full_precision
from evaluation.extractors.inception import open_inception, open_inception_clean
from evaluation.extractors.lpips import LPIPS, open_lpips
from evaluation.extractors.preference import open_hps, open_pickscore
from evaluation.weights import Weights
from fdistill.base.errors import ArgumentError, did_you_mean

__all__ = [
    "EXTRACTORS",
    "LPIPS",
    "TEXT_IMAGE_MODELS",
    "ClipModel",
    "Extractor",
    "full_precision",
    "open_clip_model",
    "open_extractor",
    "open_lpips",
    "open_text_image_model",
]


#: Models that compare images with their prompts: name -> (name, device, weights) -> the model.
TEXT_IMAGE_MODELS: dict[str, Callable[[str, torch.device, Weights], ClipModel]] = {
    **dict.fromkeys(CLIP_MODELS, open_clip_model),
    "hps21": open_hps,
    "pickscore": open_pickscore,
}


def open_text_image_model(name: str, device: torch.device, weights: Weights) -> ClipModel:
    """Opens one of `TEXT_IMAGE_MODELS` on a device; raises what that raises."""
    return TEXT_IMAGE_MODELS[name](name, device, weights)


def _image_side(name: str) -> Callable[[torch.device, Weights], Extractor]:
    return lambda device, weights: open_text_image_model(name, device, weights).extractor


EXTRACTORS: dict[str, Callable[[torch.device, Weights], Extractor]] = {
    "inception": open_inception,
    "inception-clean": open_inception_clean,
    "dinov2": open_dinov2,
    **{name: _image_side(name) for name in TEXT_IMAGE_MODELS},
    "digits": open_digits,
    "digits-captioned": open_captioned_digits,
    "digit-pairs": open_digit_pairs,
}


def open_extractor(name: str, device: torch.device, weights: Weights) -> Extractor:
    """Opens the feature network of a name in `EXTRACTORS` on a device.

    Raises:
        ArgumentError: an unknown name.
        CheckpointError: its weights are not found, are unreadable, or are of another network.
    """
    if name not in EXTRACTORS:
        raise ArgumentError(f"extractor {name!r}: {did_you_mean(name, EXTRACTORS)}")
    return EXTRACTORS[name](device, weights)

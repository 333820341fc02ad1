"""The small network that comes with the package, for scores of digits; they are never called FID."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evaluation.digit_features import FEATURE_DIM, load_digit_features, weights_sha256
from evaluation.extractors.extractor import Extractor, runner
from evaluation.weights import Weights
from fdistill.data.digit_captions import as_digits
from fdistill.images import to_unit


def open_digits(device: torch.device, weights: Weights) -> Extractor:
    """Greyscale digits [B, 1, 8, 8] -> features [B, 64] and logits [B, 10] of the ten classes."""
    return _open("digits", device, (1, 8, 8), lambda images: images, "8x8 pixels as they are, x / 127.5 - 1")


def open_captioned_digits(device: torch.device, weights: Weights) -> Extractor:
    """The same for digits [B, 3, 16, 16]."""
    preparation = "means of 2x2 pixels and three colours, rounded to 8x8 bytes; x / 127.5 - 1"
    return _open("digits-captioned", device, (3, 16, 16), as_digits, preparation)


def _open(
    name: str,
    device: torch.device,
    shape: tuple[int, int, int],
    prepare: Callable[[Tensor], Tensor],
    preparation: str,
) -> Extractor:
    network = load_digit_features().to(device)

    def compute(images: Tensor) -> dict[str, Tensor]:
        features, logits = network(to_unit(prepare(images)).to(device))
        return {"features": features, "logits": logits}

    run = runner(compute, device, shape)
    return Extractor(name, {"features": FEATURE_DIM, "logits": 10}, run, preparation, weights_sha256(), True)

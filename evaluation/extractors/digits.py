"""The small network of digits that comes with the package. Its Frechet distances are never called FID."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.extractors.digit_features import FEATURE_DIM, load_digit_features, weights_sha256
from evaluation.extractors.extractor import Extractor, runner
from evaluation.weights import Weights
from fdistill.base.images import to_unit
from fdistill.data.digit_captions import as_digits, digit_ink
from fdistill.data.digit_pairs import halves

_OUTPUTS = {"features": FEATURE_DIM, "logits": 10}


def open_digits(device: torch.device, weights: Weights) -> Extractor:
    """Greyscale digits [B, 1, 8, 8] -> features [B, 64] and logits [B, 10] of the ten classes."""
    network = load_digit_features().to(device)

    def compute(images: Tensor) -> dict[str, Tensor]:
        features, logits = network(to_unit(images).to(device))
        return {"features": features, "logits": logits}

    preparation = "8x8 pixels as they are, x / 127.5 - 1"
    return Extractor("digits", _OUTPUTS, runner(compute, device, (1, 8, 8)), preparation, weights_sha256(), True)


def open_captioned_digits(device: torch.device, weights: Weights) -> Extractor:
    """The same of captioned digits [B, 3, 16, 16], and their ink [B, 1]: the mean brightness in [0, 1]."""
    network = load_digit_features().to(device)

    def compute(images: Tensor) -> dict[str, Tensor]:
        features, logits = network(to_unit(as_digits(images)).to(device))
        return {"features": features, "logits": logits, "ink": digit_ink(images)[:, None]}

    preparation = "means of 2x2 pixels and three colours, rounded to 8x8 bytes; x / 127.5 - 1"
    run = runner(compute, device, (3, 16, 16))
    return Extractor("digits-captioned", {**_OUTPUTS, "ink": 1}, run, preparation, weights_sha256(), True)


def open_digit_pairs(device: torch.device, weights: Weights) -> Extractor:
    """The same of digit pairs [B, 3, 16, 16]: the features of both halves [B, 128], and the logits of each [B, 10]."""
    network = load_digit_features().to(device)

    def compute(images: Tensor) -> dict[str, Tensor]:
        sides = [network(to_unit(half[:, None]).to(device)) for half in halves(images).unbind(1)]
        features = torch.cat([found for found, _ in sides], dim=1)
        return {"features": features, "left": sides[0][1], "right": sides[1][1]}

    preparation = "the mean of three colours, cut into two digits of 8x8 bytes; x / 127.5 - 1"
    outputs = {"features": 2 * FEATURE_DIM, "left": 10, "right": 10}
    return Extractor("digit-pairs", outputs, runner(compute, device, (3, 16, 16)), preparation, weights_sha256(), True)

"""The embedded digits with captions: 16x16 RGB images, a true caption of each, and prompts whose answer is known.

A digit is bold if it has more ink than the median of its own class, and thin otherwise. The median of all digits
together would part the ink as far (0.055 of 1), but make 69 % of the eights and only 39 % of the sevens bold: the
weight word would then say something about the digit as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fdistill.base.images import to_uint8, to_unit
from fdistill.data.digits import load_digits
from fdistill.data.source import ArraySource, Kind

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHT_WORDS = ("thin", "bold")

#: Phrasings that name the weight of the strokes.
WEIGHTED = (
    "a {weight} handwritten {digit}",
    "a {weight} {digit}",
    "a {weight} digit {digit}",
    "the digit {digit} in {weight} strokes",
    "{weight} {digit}",
)
#: Phrasings that do not name it.
PLAIN = ("a handwritten {digit}", "the digit {digit}", "{digit}")


@dataclass(frozen=True)
class DigitPrompt:
    """A caption, the digit that it names, and the weight that it names (None if it names none)."""

    text: str
    digit: int
    weight: str | None


def true_prompts(digit: int, weight: str) -> list[DigitPrompt]:
    """All captions that are true of a digit of this weight: first those of WEIGHTED, then those of PLAIN, in order."""
    word = DIGIT_WORDS[digit]
    weighted = [DigitPrompt(text.format(weight=weight, digit=word), digit, weight) for text in WEIGHTED]
    return weighted + [DigitPrompt(text.format(digit=word), digit, None) for text in PLAIN]


def evaluation_prompts(per_digit: int = 50) -> list[DigitPrompt]:
    """The same number of prompts for each digit, phrasings and weight words mixed evenly; the digits take turns."""
    mixed = [
        [
            prompt
            for pair in zip(*(true_prompts(digit, weight) for weight in WEIGHT_WORDS), strict=True)
            for prompt in pair
        ]
        for digit in range(10)
    ]
    return [mixed[digit][k % len(mixed[digit])] for k in range(per_digit) for digit in range(10)]


def load_digit_images() -> tuple[Tensor, Tensor, Tensor]:
    """(images uint8 [1797, 3, 16, 16], labels int64 [1797] in [0, 9], bold bool [1797]) of the embedded digits.

    The three colours are equal. Resized bicubically from 8x8, with one correction towards images whose 2x2 averages
    are the original digits (the first step of Irani and Peleg's back-projection, 1991): the digit feature network then
    reads 99.8 % of them rightly; 99.5 % without the correction, 99.9 % of the originals.
    """
    digits, labels = load_digits()
    x = to_unit(digits)
    missing = x - F.avg_pool2d(_double(x), 2)
    ink = digit_ink(digits)
    medians = torch.stack([ink[labels == digit].median() for digit in range(10)])
    return to_uint8(_double(x + missing)).expand(-1, 3, -1, -1).contiguous(), labels, ink > medians[labels]


def load_captioned_digits(seed: int = 0) -> tuple[Tensor, list[DigitPrompt]]:
    """(images as `load_digit_images`, one true caption for each, drawn evenly from `true_prompts`)."""
    images, labels, bold = load_digit_images()
    draws = np.random.default_rng(seed).random(len(images))
    captions = []
    for digit, weight, draw in zip(labels.tolist(), bold.tolist(), draws, strict=True):
        prompts = true_prompts(digit, WEIGHT_WORDS[weight])
        captions.append(prompts[int(draw * len(prompts))])
    return images, captions


def open_captioned_digits(name: str) -> ArraySource:
    """The images of `load_captioned_digits` with their digits as classes and their prompts as captions."""
    images, prompts = load_captioned_digits()
    labels = torch.tensor([prompt.digit for prompt in prompts])
    return ArraySource(name, images, labels, 10, [prompt.text for prompt in prompts])


KIND = Kind("digit-captions", lambda where: where == "digit-captions", open_captioned_digits)


def as_digits(images: Tensor) -> Tensor:
    """uint8 [N, 3, 16, 16] -> uint8 [N, 1, 8, 8] for the digit feature network: means of 2x2 pixels and colours."""
    return F.avg_pool2d(images.float().mean(1, keepdim=True), 2).round().to(torch.uint8)


def digit_ink(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> float32 [N] in [0, 1], the mean brightness: the strokes are white."""
    return images.float().mean((1, 2, 3)) / 255


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic").clamp(-1, 1)

"""Pairs of the embedded digits with captions that say which is where: 16x16 RGB images, left and right an 8x8 digit.

A model that knows which digits a caption names, but not how it relates them, draws half of the pairs the wrong way
round.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from fdistill.data.digit_captions import DIGIT_WORDS
from fdistill.data.digits import load_digits
from fdistill.data.source import ArraySource, Kind

COUNT = 5000
PHRASES = (
    "{left} left of {right}",
    "{right} right of {left}",
    "the {left} is left of the {right}",
    "the {right} is right of the {left}",
)
_TOP, _SIDE = 4, 8  # rows of black above and below the digits, and their side


@dataclass(frozen=True)
class PairPrompt:
    """A caption, and the digits that it asks for on the left and on the right."""

    text: str
    left: int
    right: int


def true_pair_prompts(left: int, right: int) -> list[PairPrompt]:
    """All captions that are true of a pair, in the order of `PHRASES`."""
    words = {"left": DIGIT_WORDS[left], "right": DIGIT_WORDS[right]}
    return [PairPrompt(phrase.format(**words), left, right) for phrase in PHRASES]


def pair_evaluation_prompts(per_pair: int = 5) -> list[PairPrompt]:
    """The same number of prompts for each of the 100 pairs; pairs take turns, and so do the phrases of a pair."""
    return [
        true_pair_prompts(left, right)[(k + left + right) % len(PHRASES)]
        for k in range(per_pair)
        for left, right in product(range(10), repeat=2)
    ]


def load_digit_pairs(seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """(images uint8 [5000, 3, 16, 16], labels int64 [5000, 2]: the digits on the left and on the right, one true
    caption for each). Digits and captions are drawn evenly; the three colours are equal.
    """
    digits, labels = load_digits()
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.integers(0, len(digits), (COUNT, 2)))
    images = torch.zeros(COUNT, 3, 2 * _SIDE, 2 * _SIDE, dtype=torch.uint8)
    for place in range(2):
        columns = slice(place * _SIDE, (place + 1) * _SIDE)
        images[:, :, _TOP : _TOP + _SIDE, columns] = digits[rows[:, place]]
    pairs = labels[rows]
    phrases = random.integers(0, len(PHRASES), COUNT)
    captions = [
        true_pair_prompts(left, right)[phrase].text
        for (left, right), phrase in zip(pairs.tolist(), phrases.tolist(), strict=True)
    ]
    return images, pairs, captions


def open_digit_pairs(name: str) -> ArraySource:
    """The images of `load_digit_pairs` with their captions; the class of a pair is 10 left + right."""
    images, pairs, captions = load_digit_pairs()
    return ArraySource(name, images, 10 * pairs[:, 0] + pairs[:, 1], 100, captions)


KIND = Kind("digit-pairs", lambda where: where == "digit-pairs", open_digit_pairs)


def halves(images: Tensor) -> Tensor:
    """uint8 [N, 3, 16, 16] -> uint8 [N, 2, 8, 8] for the digit feature network: left and right, the mean of the
    colours.
    """
    grey = images.float().mean(1).round().to(torch.uint8)[:, _TOP : _TOP + _SIDE]
    return torch.stack(grey.split(_SIDE, dim=2), dim=1)

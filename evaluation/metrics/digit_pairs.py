"""Metrics of digit pairs: whether an image shows both digits of its prompt in their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.own_prompts import prompts_of
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import binomial_score

if TYPE_CHECKING:
    from torch import Tensor

    from fdistill.data.digit_pairs import PairPrompt


def pair_metrics(left: str, right: str) -> tuple[Metric, Metric]:
    """The share of images with the prompt's digits on their sides, "pair_accuracy", and of those with each digit in the
    other's place, "exchanged"; prompts that name one digit twice count in the first alone.

    A model that draws the digits a prompt names, and does not understand which is where, has as much of both.

    Args:
        left, right: the features that are logits [N, 10] of the two sides.
    """

    def shown(measured: Measured) -> tuple[Tensor, Tensor]:
        import torch

        asked = torch.tensor([(prompt.left, prompt.right) for prompt in _prompts(measured)])
        return asked, torch.stack([measured.samples[name].argmax(1).cpu() for name in (left, right)], dim=1)

    def accuracy(measured: Measured) -> dict[str, Score]:
        asked, found = shown(measured)
        return {"pair_accuracy": _share((found == asked).all(1))}

    def exchanged(measured: Measured) -> dict[str, Score]:
        asked, found = shown(measured)
        return {"exchanged": _share((found == asked.flip(1)).all(1) & (asked[:, 0] != asked[:, 1]))}

    first, second = (
        Metric(
            name=name,
            outputs=(name,),
            higher_is_better=better,
            compute=compute,
            features=(left, right),
            needs="prompts",
        )
        for name, better, compute in (("pair_accuracy", True, accuracy), ("exchanged", False, exchanged))
    )
    return first, second


def _share(true: Tensor) -> Score:
    return binomial_score(true.double().mean().item(), len(true))


def _prompts(measured: Measured) -> list[PairPrompt]:
    """The protocol's prompt of each image; ArgumentError if the images were generated from others."""
    from fdistill.data.digit_pairs import pair_evaluation_prompts

    return prompts_of(measured, "digit-pairs", pair_evaluation_prompts())

"""Metrics of the captioned digits: whether an image shows the digit of its prompt, and how bold it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.metrics.accuracy import accuracy
from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.own_prompts import prompts_of
from evaluation.metrics.score import Score

if TYPE_CHECKING:
    from fdistill.data.digit_captions import DigitPrompt


def prompt_accuracy_metric(logits: str) -> Metric:
    """The share of images that the classifier of the features `logits` assigns to the digit of their prompt."""

    def compute(measured: Measured) -> dict[str, Score]:
        import torch

        digits = torch.tensor([prompt.digit for prompt in _prompts(measured)])
        return {"prompt_accuracy": accuracy(measured.samples[logits], digits)}

    return Metric(
        name="prompt_accuracy",
        outputs=("prompt_accuracy",),
        higher_is_better=True,
        compute=compute,
        features=(logits,),
        needs="prompts",
    )


def ink_metric(ink: str) -> Metric:
    """Mean ink in [0, 1] of images whose prompt says bold, and of those whose prompt says thin: the first should be
    larger. The features `ink` are [N, 1].
    """

    def compute(measured: Measured) -> dict[str, Score]:
        import torch

        inks, prompts = measured.samples[ink][:, 0].double(), _prompts(measured)

        def mean(weight: str) -> Score:
            chosen = inks[torch.tensor([prompt.weight == weight for prompt in prompts])]
            return Score(chosen.mean().item(), chosen.std().item() / len(chosen) ** 0.5, "standard error")

        return {"ink_bold": mean("bold"), "ink_thin": mean("thin")}

    return Metric(
        name="ink",
        outputs=("ink_bold", "ink_thin"),
        higher_is_better=None,
        compute=compute,
        features=(ink,),
        needs="prompts",
    )


def _prompts(measured: Measured) -> list[DigitPrompt]:
    """The protocol's prompt of each image; ArgumentError if the images were generated from others."""
    from fdistill.data.digit_captions import evaluation_prompts

    return prompts_of(measured, "digits-t2i", evaluation_prompts())

"""`digits-t2i`: 500 digits drawn from captions: is it the digit that was asked for, is a bold one bolder, and how like
its caption does the embedded CLIP model of digits find it?

Images are brought to the digit network's 8x8 by box averages; its distance is called fd_digits, never FID.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.metric import Measured, Metric, cosine, density_and_coverage, feature_diversity, frechet
from evaluation.metrics.accuracy import accuracy
from evaluation.metrics.score import Score
from evaluation.protocols.protocol import Protocol
from fdistill.base.errors import ArgumentError
from fdistill.data.digit_captions import DigitPrompt, evaluation_prompts

_FEATURES = "digits-captioned.features"


def _prompts(at: Measured) -> Sequence[DigitPrompt]:
    listed = evaluation_prompts()
    known = [listed[i % len(listed)] for i in range(len(at.images))]
    if at.images.prompts is None or list(at.images.prompts) != [prompt.text for prompt in known]:
        raise ArgumentError(
            f"{at.images.name}: its images were not drawn from the prompts of protocol 'digits-t2i', in their order; "
            "evaluate the student or teacher itself, or generate them from those"
        )
    return known


def _prompt_accuracy(at: Measured) -> dict[str, Score]:
    digits = torch.tensor([prompt.digit for prompt in _prompts(at)])
    return {"prompt_accuracy": accuracy(at.samples["digits-captioned.logits"], digits)}


def _ink(at: Measured) -> dict[str, Score]:
    ink, prompts = at.samples["digits-captioned.ink"][:, 0].double(), _prompts(at)

    def of(weight: str) -> Score:
        asked: Tensor = ink[torch.tensor([prompt.weight == weight for prompt in prompts])]
        return Score(asked.mean().item(), asked.std().item() / len(asked) ** 0.5, "standard error")

    return {"ink_bold": of("bold"), "ink_thin": of("thin")}


DIGITS_T2I = Protocol(
    name="digits-t2i",
    metrics=(
        Metric(
            "prompt_accuracy", ("prompt_accuracy",), ("digits-captioned.logits",), _prompt_accuracy, needs="prompts"
        ),
        Metric("ink", ("ink_bold", "ink_thin"), ("digits-captioned.ink",), _ink, needs="prompts"),
        frechet("fd_digits", _FEATURES),
        cosine("clip_digits", "clip-digits"),
        density_and_coverage(_FEATURES),
        feature_diversity("diversity_digits", _FEATURES),
    ),
    default=("prompt_accuracy", "ink_bold", "ink_thin", "fd_digits", "clip_digits"),
    num_samples=500,
    size=16,
    reference="the 1,797 captioned digits",
    embedded="digit-captions",
    reference_count=1797,
    prompts=lambda: [prompt.text for prompt in evaluation_prompts()],
)

"""`digits-t2i`: 500 digits drawn from captions: is it the digit that was asked for, and is a bold one bolder?

Images are brought to the digit network's 8x8 by box averages; its distance is called fd_digits, never FID.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaluation.digit_features import extract, load_digit_features, weights_sha256
from evaluation.frechet import frechet_distance
from evaluation.protocols.protocol import Protocol
from fdistill.data.digit_captions import as_digits, digit_ink, evaluation_prompts, load_digit_images


def _score(images: Tensor, labels: Tensor | None, reference: Tensor, metrics: tuple[str, ...]) -> dict[str, float]:
    prompts = evaluation_prompts()[: len(images)]
    network = load_digit_features()
    features, classes = extract(network, as_digits(images))
    ink = digit_ink(images)
    scores = {
        "prompt_accuracy": (classes == torch.tensor([prompt.digit for prompt in prompts])).double().mean().item(),
        "fd_digits": frechet_distance(features, extract(network, as_digits(reference))[0]),
    }
    for weight in ("bold", "thin"):
        asked = torch.tensor([prompt.weight == weight for prompt in prompts])
        scores[f"ink_{weight}"] = ink[asked].double().mean().item()
    return {name: scores[name] for name in metrics}


def _provenance() -> dict[str, Any]:
    return {
        "extractor": "digits-features (embedded)",
        "extractor_sha256": weights_sha256(),
        "resize": "box averages to 8x8, means of the three colours, rounded",
        "dtype": "float32 features, float64 statistics",
    }


DIGITS_T2I = Protocol(
    name="digits-t2i",
    num_samples=500,
    sample_shape=(3, 16, 16),
    metrics=("prompt_accuracy", "ink_bold", "ink_thin", "fd_digits"),
    needs_labels=(),
    reference="digit-captions",
    load_reference=lambda: load_digit_images()[0],
    score=_score,
    provenance=_provenance,
    prompts=lambda: [prompt.text for prompt in evaluation_prompts()],
)

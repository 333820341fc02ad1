"""The second embedded text-to-image teacher, whose captions say which of two digits is where, and its protocol."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from evaluation.evaluate import evaluate
from evaluation.extractors.digit_features import extract, load_digit_features
from evaluation.metrics.digit_pairs import pair_metrics
from evaluation.metrics.metric import Measured
from fdistill import distill
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import ArgumentError
from fdistill.base.images import to_uint8
from fdistill.data import load_data
from fdistill.data.digit_captions import DIGIT_WORDS
from fdistill.data.digit_pairs import (
    PHRASES,
    PairPrompt,
    halves,
    load_digit_pairs,
    pair_evaluation_prompts,
    true_pair_prompts,
)
from fdistill.data.digits import load_digits

FOLDER = EMBEDDED_TEACHERS["digit-pairs"]


def sides(text: str) -> tuple[int, int]:
    """The digits on the left and on the right, read from a caption word by word."""
    named = [DIGIT_WORDS.index(word) for word in text.split() if word in DIGIT_WORDS]
    assert len(named) == 2
    assert ("left" in text) != ("right" in text)
    return (named[0], named[1]) if "left" in text else (named[1], named[0])


def test_captions_say_where_the_digits_are() -> None:
    images, pairs, captions = load_digit_pairs()
    assert images.shape == (5000, 3, 16, 16)
    assert [sides(caption) for caption in captions] == [tuple(pair) for pair in pairs.tolist()]
    digits, labels = load_digits()
    known = {digit.numpy().tobytes(): label for digit, label in zip(digits, labels.tolist(), strict=True)}
    for pair, image in zip(pairs[:200].tolist(), halves(images)[:200], strict=True):
        assert [known[half.numpy().tobytes()] for half in image] == pair
    assert torch.equal(images, images[:, :1].expand(-1, 3, -1, -1))
    assert not images[:, :, [0, 3, 12, 15]].any()
    counts = Counter(map(tuple, pairs.tolist()))
    assert len(counts) == 100
    assert min(counts.values()) > 20


def test_they_depend_on_the_seed_alone() -> None:
    first, again, other = (load_digit_pairs(seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert first[2] == again[2]
    assert first[2] != other[2]
    source = load_data("digit-pairs")
    assert source.labels.tolist() == (10 * first[1][:, 0] + first[1][:, 1]).tolist()
    assert source.captions == first[2]


def test_evaluation_prompts_are_five_of_each_pair() -> None:
    prompts = pair_evaluation_prompts()
    assert Counter((prompt.left, prompt.right) for prompt in prompts) == {
        (left, right): 5 for left in range(10) for right in range(10)
    }
    assert all(sides(prompt.text) == (prompt.left, prompt.right) for prompt in prompts)
    phrases = Counter(
        next(i for i, true in enumerate(true_pair_prompts(p.left, p.right)) if true.text == p.text) for p in prompts
    )
    assert all(abs(phrases[i] - 125) <= 5 for i in range(len(PHRASES)))


def test_the_scores_count_places() -> None:
    """Logits made from the prompts: right, exchanged, one wrong, and the same digit twice."""
    prompts = pair_evaluation_prompts()[:100]
    shown = [(prompt.left, prompt.right) for prompt in prompts]
    for row in range(0, 40):
        shown[row] = shown[row][::-1]
    for row in range(60, 70):
        shown[row] = (shown[row][0], (shown[row][1] + 1) % 10)
    logits = [torch.nn.functional.one_hot(torch.tensor(side), 10).float() for side in zip(*shown, strict=True)]

    class Images:
        def __init__(self, prompts: list[str]):
            self.name, self.prompts = "images", prompts

        def __len__(self) -> int:
            return len(self.prompts)

    def measured(prompts: list[str]) -> Measured:
        features = {"left": logits[0], "right": logits[1]}
        images: Any = Images(prompts)
        return Measured(features, {}, {}, images, None, torch.device("cpu"), {})

    texts = [prompt.text for prompt in prompts]
    accuracy, exchanged = pair_metrics("left", "right")
    doubled = sum(prompt.left == prompt.right for prompt in prompts[:40])
    assert doubled == 4
    assert accuracy.compute(measured(texts))["pair_accuracy"].value == pytest.approx((100 - 40 - 10 + doubled) / 100)
    assert exchanged.compute(measured(texts))["exchanged"].value == pytest.approx((40 - doubled) / 100)
    with pytest.raises(ArgumentError, match="not generated from the prompts of protocol 'digit-pairs'"):
        accuracy.compute(measured(texts[::-1]))


def test_it_draws_both_digits_in_their_places() -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    prompts: list[PairPrompt] = [p for p in pair_evaluation_prompts() if p.left != p.right][::15]
    images = pipeline(
        [prompt.text for prompt in prompts],
        num_inference_steps=12,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    found = extract(load_digit_features(), halves(to_uint8(images * 2 - 1)).flatten(0, 1)[:, None])[1].reshape(-1, 2)
    right = (found == torch.tensor([(p.left, p.right) for p in prompts])).all(1)
    assert right.double().mean() > 0.9
    facts = json.loads((FOLDER / "training.json").read_text())
    assert facts["guidance_2"]["pair_accuracy"] > 0.95
    assert facts["guidance_2"]["exchanged"] < 0.02


@pytest.mark.thorough
def test_a_student_is_trained_and_measured(tmp_path: Path) -> None:
    """Two iterations, and 140 images: whether the config, the data and the protocol fit each other."""
    quick: dict[str, Any] = {"iterations": 2, "batch_size": 4, "log.samples_every": 2, "log.tracker": "none"}
    student = distill("digit-pairs", output=tmp_path / "run", **quick)
    made = evaluate(samples=str(student), protocol="digit-pairs", num_images=140, device="cpu")
    assert {name.split("@")[0] for name in made["metrics"]} == {"pair_accuracy", "exchanged", "fd_pairs"}
    (grid,) = (tmp_path / "run" / "samples").glob("*002*.png")
    assert np.asarray(Image.open(grid)).std() > 1

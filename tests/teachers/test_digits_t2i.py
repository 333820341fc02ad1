"""The embedded text-to-image teacher and the captions it was trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from evaluation.extractors.digit_features import extract, load_digit_features
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.images import to_uint8, to_unit
from fdistill.data.digit_captions import (
    DIGIT_WORDS,
    PLAIN,
    WEIGHTED,
    as_digits,
    digit_ink,
    evaluation_prompts,
    load_captioned_digits,
    load_digit_images,
)
from fdistill.data.digits import load_digits

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

FOLDER = EMBEDDED_TEACHERS["digits-t2i"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded = DiffusionPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: Any, prompts: list[str], guidance: float, steps: int = 10) -> Tensor:
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    return to_uint8(images * 2 - 1)


def test_captions_say_the_truth() -> None:
    """Digit and weight against the original 8x8 images, with numpy."""
    digits, labels = load_digits()
    ink = digits.numpy().mean((1, 2, 3))
    images, captions = load_captioned_digits()
    assert images.shape == (1797, 3, 16, 16)
    assert images.dtype == torch.uint8
    for label in range(10):
        rows = np.flatnonzero(labels.numpy() == label)
        of_class = np.median(ink[rows])
        for row in rows:
            words = captions[row].text.split()
            assert [DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS] == [label]
            assert captions[row].digit == label
            assert [word for word in words if word in ("bold", "thin")] == (
                [] if captions[row].weight is None else [captions[row].weight]
            )
            if captions[row].weight is not None:
                assert (captions[row].weight == "bold") == (ink[row] > of_class), row
    english = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert english == DIGIT_WORDS
    phrasings = {
        phrase: sum(p.text == phrase.format(weight=p.weight, digit=DIGIT_WORDS[p.digit]) for p in captions)
        for phrase in WEIGHTED + PLAIN
    }
    assert min(phrasings.values()) > 180, phrasings  # 225 expected of each of the 8
    assert sum(phrasings.values()) == 1797


def test_captions_depend_on_the_seed_alone() -> None:
    first, again, other = (load_captioned_digits(seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_images_are_the_digits_at_twice_the_size() -> None:
    digits, labels = load_digits()
    images, same_labels, bold = load_digit_images()
    assert torch.equal(labels, same_labels)
    assert torch.equal(images, images[:, :1].expand(-1, 3, -1, -1))
    blocks = images[:, 0].double().reshape(-1, 8, 2, 8, 2).mean((2, 4))
    assert (as_digits(images)[:, 0].double() - blocks).abs().max() <= 0.5
    assert (blocks - digits[:, 0]).square().mean().sqrt() < 10  # of 255; 14 without the correction
    assert (extract(load_digit_features(), as_digits(images))[1] == labels).double().mean() > 0.997
    assert all(0.48 < bold[labels == label].double().mean() <= 0.5 for label in range(10))


def test_grey_is_the_mean_of_the_colours() -> None:
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[0, 0, :2, :2] = 255
    image[0, 1, 0, 0] = 255
    expected = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    expected[0, 0, 0, 0] = round(255 * (4 + 1) / 12)
    assert torch.equal(as_digits(image), expected)
    assert digit_ink(image).item() == pytest.approx(5 / (3 * 256))


def test_evaluation_prompts_are_500_of_all_kinds() -> None:
    prompts = evaluation_prompts()
    assert [sum(p.digit == digit for p in prompts) for digit in range(10)] == [50] * 10
    assert all(DIGIT_WORDS[p.digit] in p.text.split() for p in prompts)
    assert all(
        any(p.text == phrase.format(weight=p.weight, digit=DIGIT_WORDS[p.digit]) for p in prompts)
        for phrase in WEIGHTED + PLAIN
    )
    counts = {weight: sum(p.weight == weight for p in prompts) for weight in ("bold", "thin", None)}
    assert min(counts.values()) >= 150, counts
    assert len({p.digit for p in evaluation_prompts(3)[:10]}) == 10


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_the_card_has_the_measured_scores() -> None:
    scores, card = json.loads((FOLDER / "training.json").read_text()), (FOLDER / "README.md").read_text()
    for guidance in ("guidance_1", "guidance_2"):
        assert f"{scores[guidance]['accuracy']:.1%}" in card
        assert scores[guidance]["accuracy"] >= 0.95
        assert scores[guidance]["ink_bold"] > scores[guidance]["ink_thin"] + 0.03
        for distance, real in scores["training_images"].items():  # it has not memorised them
            assert scores[guidance][distance] > 0.9 * real
    assert scores["samples"] == 500
    assert scores["training_cpu_minutes"] < 30


@pytest.mark.thorough
def test_plain_diffusers_loads_it_without_a_word() -> None:
    code = (
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(FOLDER)!r})\n"
        "import sys, torch\n"
        "assert 'fdistill' not in sys.modules\n"
        "print(type(pipeline).__name__, pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=FOLDER.parent
    )
    assert done.stdout.split() == ["StableDiffusionPipeline", *["torch.float32"] * 3]
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert said == []


def test_transformers_4_finds_the_text_encoder_too() -> None:
    """It looks for names that start with `text_model.`, which transformers 5 does not write by itself."""
    names = load_file(FOLDER / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    config = json.loads((FOLDER / "tokenizer" / "tokenizer_config.json").read_text())
    assert "backend" not in config


def test_each_word_of_a_caption_is_one_token(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    texts = {p.text for p in evaluation_prompts()}
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= tokenizer.model_max_length
        assert ids == AutoTokenizer.from_pretrained(FOLDER / "tokenizer")(text.upper()).input_ids
    assert pipeline.text_encoder.config.vocab_size == len(tokenizer)
    assert pipeline.text_encoder.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["zebra", "café 日本", "nineteen!"])
def test_words_it_never_saw_are_written_in_bytes(pipeline: Any, text: str) -> None:
    ids = pipeline.tokenizer(text).input_ids
    assert pipeline.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_the_script_writes_the_same_tokenizer(tmp_path: Path) -> None:
    from small_stable_diffusion import write_tokenizer
    from train_digits_t2i import caption_words

    write_tokenizer(tmp_path / "tokenizer", caption_words())
    written = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (FOLDER / "tokenizer").iterdir()}


@torch.no_grad()
def test_latents_have_mean_0_and_variance_1_and_are_decoded_well(pipeline: Any) -> None:
    x = to_unit(load_digit_images()[0])
    posterior = pipeline.vae.encode(x).latent_dist
    latents = posterior.mode() * pipeline.vae.config.scaling_factor
    assert latents.mean((0, 2, 3)).abs().max() < 0.02
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    assert (pipeline.vae.decode(posterior.mode()).sample - x).square().mean() < 2e-3


def test_schedule_is_that_of_stable_diffusion(pipeline: Any) -> None:
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)
    config = pipeline.scheduler.config
    assert (config.clip_sample, config.steps_offset, config.set_alpha_to_one) == (False, 1, False)
    assert config.prediction_type == "v_prediction"


@pytest.mark.thorough
def test_it_draws_the_digit_asked_for_in_the_weight_asked_for(pipeline: Any) -> None:
    prompts = evaluation_prompts(12)
    samples = draw(pipeline, [p.text for p in prompts], guidance=2)
    classes = extract(load_digit_features(), as_digits(samples))[1]
    assert (classes == torch.tensor([p.digit for p in prompts])).double().mean() >= 0.95
    ink = {weight: digit_ink(samples[[p.weight == weight for p in prompts]]).mean() for weight in ("bold", "thin")}
    assert ink["bold"] > ink["thin"] + 0.03
    of_data = (
        digit_ink(load_digit_images()[0]).mean().item()
    )  # v read as epsilon draws legible digits, half again as bold
    assert digit_ink(samples).mean().item() == pytest.approx(of_data, abs=0.03)


def test_the_empty_prompt_draws_any_digit(pipeline: Any) -> None:
    """What classifier-free guidance takes away must be the mixture of all digits."""
    classes = extract(load_digit_features(), as_digits(draw(pipeline, [""] * 100, guidance=1)))[1]
    counts = torch.bincount(classes, minlength=10)
    assert counts.max() <= 40, counts
    assert (counts > 0).sum() >= 7, counts

"""`--dry-run` writes nothing, and says what a run would encode and draw, and how much."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fdistill.commands.cli import app
from fdistill.config.reading import load_config
from fdistill.data.digit_captions import WEIGHT_WORDS, evaluation_prompts, true_prompts
from fdistill.training.build import build
from fdistill.training.inputs import training_data
from support.text_families import sd15
from support.text_runs import PROMPTS, SETTINGS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15(tmp_path_factory.mktemp("teacher") / "sd15")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache would be; there is none yet."""
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, int]:
    """Every file below a folder, with the time of its last change."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def dry_run(tmp_path: Path, name: str, settings: dict[str, Any], *more: str) -> str:
    """What it says, of a run whose folder must not appear; nothing may change in the cache, or stay in /tmp."""
    before = contents(tmp_path / "cache")
    overrides = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    output = ["--output", str(tmp_path / "run"), "--dry-run"]
    done = CliRunner().invoke(app, ["distill", name, *overrides, *output, *more])
    assert done.exit_code == 0, done.exception or done.output
    assert contents(tmp_path / "cache") == before
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "tmp").glob("fdistill*"))
    return done.output


def test_a_run_of_plain_images_needs_nothing_beforehand(cache: Path, tmp_path: Path) -> None:
    said = dry_run(tmp_path, "digits", {"eval.every": 0})
    assert "beforehand" not in said
    assert "fake score     denoises with the weight 'edm', as the teacher was trained" in said
    assert not cache.exists()


def test_it_says_how_the_fake_score_learns(cache: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    settings = {**SETTINGS, "teacher": str(teacher), "prompts": str(tmp_path / "prompts.txt")}
    said = dry_run(tmp_path, "digits", settings)
    assert "fake score     denoises with the weight 'inverse-sigma2', as the teacher was trained" in said
    said = dry_run(tmp_path, "digits", {**settings, "fake_score.weighting": "edm"})
    assert "the weight 'edm', while the teacher was trained with 'inverse-sigma2'" in said
    assert "denoises" not in dry_run(tmp_path, "digits-diffratio", {})


def test_embedded_captioned_images(cache: Path, tmp_path: Path) -> None:
    captions = {prompt.text for digit in range(10) for word in WEIGHT_WORDS for prompt in true_prompts(digit, word)}
    said = dry_run(tmp_path, "digits-t2i", {"eval.every": 0})
    assert "would encode 1,797 images to latents (none of them cached)" in said
    assert f"would encode {len(captions)} prompts (none of them cached)" in said
    assert not cache.exists()
    with pytest.raises(AssertionError, match="but the teacher's images are 12x12"):
        # Latents of 6 x 6 that are never encoded: the images do not fit, and a run would refuse them.
        dry_run(tmp_path, "digits-t2i", {"eval.every": 0, "resolution": 12})


def test_a_list_of_prompts_and_teacher_samples(cache: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(3 * PROMPTS))
    settings = {**SETTINGS, "teacher": str(teacher), "prompts": str(tmp_path / "prompts.txt")}
    said = dry_run(tmp_path, "digits", settings)
    assert "would encode 12 prompts (none of them cached)" in said
    assert "would draw 8 teacher samples with 3 evaluations each" in said
    assert not cache.exists()

    config = load_config("digits", settings)
    run = build(config, torch.device("cpu"))
    assert "12 prompts are in the cache" in dry_run(tmp_path, "digits", settings)
    training_data(run)
    said = dry_run(tmp_path, "digits", settings)
    assert "8 teacher samples with 3 evaluations each are in the cache" in said
    assert "would" not in said
    other = dry_run(tmp_path, "digits", {**settings, "negative_prompt": "a house"})
    assert "would encode 12 prompts" in other
    assert "would draw 8 teacher samples" in other


def test_teacher_samples_in_place_of_data_and_as_pairs(cache: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {"teacher": str(tiny_teacher), "eval.every": 0}
    said = dry_run(tmp_path, "digits", {**settings, "data": "teacher-samples", "teacher_samples.count": 10000})
    assert "would draw 10,000 teacher samples with 35 evaluations each" in said
    said = dry_run(tmp_path, "digits", {**settings, "method": "dmd", "regression.pairs": 600})
    assert "would draw 600 teacher samples with 35 evaluations each" in said
    assert not cache.exists()


def test_prompts_of_the_evaluation(cache: Path, tmp_path: Path) -> None:
    asked = {prompt.text for prompt in evaluation_prompts()[:70]}
    said = dry_run(tmp_path, "digits-t2i", {"eval.every": 5, "eval.protocol": "digits-t2i", "eval.num_images": 70})
    assert f"would encode {len(asked)} evaluation prompts (none of them cached)" in said
    assert not cache.exists()


def test_a_teacher_that_is_made_of_files_first(cache: Path, teacher: Path, tmp_path: Path) -> None:
    """A LoRA is merged where the dry run can load it, and nothing of that is kept."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")[f"{layer}.weight"].shape[0]
    lora = {"A": torch.ones(2, width), "B": torch.ones(width, 2)}
    tensors = {f"unet.{layer}.lora_{name}.weight": value for name, value in lora.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat")
    settings = {**SETTINGS, "teacher": str(teacher), "teacher_lora": str(tmp_path / "lora.safetensors")}
    said = dry_run(tmp_path, "digits", {**settings, "prompts": str(tmp_path / "prompts.txt")})
    assert "would encode 1 prompts" in said
    assert not cache.exists()


def test_a_smoke_run(cache: Path, tmp_path: Path) -> None:
    said = dry_run(tmp_path, "sd15", {}, "--smoke")
    assert "iterations     3, each" in said
    assert not cache.exists()


def test_parquet_files_are_not_copied_into_the_cache(cache: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": list(pixels), "label": [0, 1, 2, 3]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    dry_run(tmp_path, "digits", {"teacher": str(tiny_teacher), "data": tmp_path / "train.parquet", "eval.every": 0})
    assert not cache.exists()

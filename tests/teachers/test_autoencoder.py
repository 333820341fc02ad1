"""Latent teachers: images encoded once, training on the cache, refusals of what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fdistill import distill, generate
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError, DataError
from fdistill.data.latents import LatentSource
from fdistill.training.cache import cache
from support.families import FAMILIES, dit, edm2_latent

SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "iterations": 2,
    "student_level": None,
    "log.tracker": "none",
    "log.samples_every": 0,
    "generator.lr": 1e-3,
}
DIT = SETTINGS | {"discriminator.features": ["block1", "block2"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images of 20x24 pixels in 3 classes, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for i in range(21):
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dit(tmp_path_factory.mktemp("teachers") / "dit")


@pytest.fixture(scope="module")
def latents(images: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(images, teacher=teacher, output=tmp_path_factory.mktemp("cache") / "latents", flip=True, batch_size=8)


def test_every_image_and_its_mirror_image_is_there_once(latents: Path, images: Path, teacher: Path) -> None:
    source = LatentSource(latents)
    assert len(source) == 42
    assert source.num_classes == 3
    assert torch.bincount(source.labels).tolist() == [14, 14, 14]
    assert source.shape == (4, 8, 8)
    vae = AutoencoderKL.from_pretrained(teacher / "vae").eval()
    stored = source.moments(torch.arange(42))[0]
    for path in sorted(images.rglob("*.png")):
        square = Image.open(path).crop((2, 0, 22, 20)).resize((16, 16), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        for version in (pixels, pixels.flip(-1)):
            with torch.no_grad():
                mean = vae.encode(version).latent_dist.mean[0]
            assert (stored - mean).abs().amax(dim=(1, 2, 3)).min() < 1e-4
    meta = json.loads((latents / "latents.json").read_text())
    assert (meta["latent_scale"], meta["sampling"], meta["resolution"]) == ([0.5] * 4, "sample", 16)
    assert (meta["recipe"], meta["flip"]) == ("center-box", True)


def test_training_on_the_cache_and_images_from_the_student(latents: Path, teacher: Path, tmp_path: Path) -> None:
    student = distill(
        "digits", output=tmp_path / "run", teacher=str(teacher), data=str(latents), guidance_scale=1.5, **DIT
    )
    made = generate(student, num_images=3, output=tmp_path / "images")
    with Image.open(made / "000000.png") as image:
        assert image.size == (16, 16)
        assert image.mode == "RGB"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(records[-1]["discriminator/gan_real"])


def test_the_autoencoder_does_not_run_in_a_step(
    latents: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *a, **k: calls.append("encode"))
    decode = AutoencoderKL.decode

    def counted(self: AutoencoderKL, *arguments: Any, **options: Any) -> Any:
        calls.append("decode")
        return decode(self, *arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", counted)
    distill("digits", output=tmp_path / "run", teacher=str(teacher), data=str(latents), **DIT)
    assert calls == ["decode"]  # for the model card


def test_teacher_samples_stay_latents(teacher: Path, tmp_path: Path) -> None:
    settings = DIT | {"data": "teacher-samples", "teacher_samples.count": 8, "teacher_samples.num_steps": 2}
    student = distill("digits", output=tmp_path / "run", teacher=str(teacher), **settings)
    assert (student / "samples.png").is_file()


def test_a_cache_from_images_of_another_range_is_refused(images: Path, tmp_path: Path) -> None:
    """Caches of before the range was noted were made from images in [-1, 1], which EDM2's networks do not know."""
    teacher = edm2_latent(tmp_path / "edm2")
    cached = cache(images, teacher=teacher, output=tmp_path / "latents")
    meta = json.loads((cached / "latents.json").read_text())
    assert meta.pop("pixel_range") == [0, 1]
    meta.pop("sha256_of_this_file")  # which those caches did not have either
    (cached / "latents.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"pixel_range is \[-1\.0, 1\.0\], but this run needs \[0\.0, 1\.0\]"):
        distill("digits", output=tmp_path / "run", teacher=str(teacher), data=str(cached), **SETTINGS)


def test_another_teachers_cache_is_refused(latents: Path, images: Path, teacher: Path, tmp_path: Path) -> None:
    other = edm2_latent(tmp_path / "other")
    with pytest.raises(DataError, match="latent_scale"):
        distill("digits", output=tmp_path / "a", teacher=str(other), data=str(latents), **SETTINGS)
    changed = tmp_path / "changed"
    shutil.copytree(teacher, changed)
    vae = AutoencoderKL.from_pretrained(teacher / "vae")
    with torch.no_grad():
        vae.quant_conv.weight[0, 0] += 0.1
    vae.save_pretrained(changed / "vae")
    with pytest.raises(DataError, match="cached latents: vae is"):
        distill("digits", output=tmp_path / "b", teacher=str(changed), data=str(latents), **DIT)
    with pytest.raises(ConfigError, match=r"encode them once with `fdistill cache"):
        distill("digits", output=tmp_path / "c", teacher=str(teacher), data=str(images), **DIT)
    with pytest.raises(ConfigError, match="makes pixels; expected images"):
        distill("digits", output=tmp_path / "d", data=str(latents), **SETTINGS)


def test_what_cannot_be_encoded_is_said(images: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="makes pixels"):
        cache(images, teacher="digits", output=tmp_path / "a")
    with pytest.raises(ArgumentError, match="did you mean 'sample'"):
        cache(images, teacher=teacher, output=tmp_path / "a", sampling="samples")
    without = tmp_path / "without"
    shutil.copytree(teacher, without, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(CheckpointError, match="copy it into vae/"):
        cache(images, teacher=without, output=tmp_path / "a")
    assert len(LatentSource(cache(images, teacher=without, vae=str(teacher), output=tmp_path / "a"))) == 21
    three = tmp_path / "three"
    AutoencoderKL(latent_channels=3, norm_num_groups=4, block_out_channels=(8,)).save_pretrained(three)
    with pytest.raises(CheckpointError, match="has latents of 3 channels"):
        cache(images, teacher=without, vae=str(three), output=tmp_path / "b")


def test_an_unreadable_image_is_left_out(images: Path, teacher: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    for i in range(120):  # so that one is less than 1 %
        shutil.copy(images / "class0" / "00.png", broken / "class0" / f"copy{i}.png")
    (broken / "class1" / "01.png").write_bytes(b"not an image")
    source = LatentSource(cache(broken, teacher=teacher, output=tmp_path / "latents", batch_size=64))
    assert len(source) == 140


def test_all_latent_families_are_here() -> None:
    assert {"dit", "sit", "edm2-latent"} <= FAMILIES.keys()

"""Copies of training photos are found by the command of docs/text-to-image.md, whatever the sizes of the photos."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from evaluation import extractors
from evaluation.extractors import Extractor
from fdistill.commands.cli import app

PAGE = Path(__file__).parent.parent.parent / "docs" / "text-to-image.md"
SIZES = ((400, 300), (256, 256), (300, 520))


def smooth(random: np.random.Generator, width: int, height: int) -> Image.Image:
    small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def central_square(image: Image.Image) -> Image.Image:
    """As a student that copies would draw it: smaller, and a little blurred."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((128, 128), Image.Resampling.BICUBIC)


@pytest.fixture
def thumbnails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Features of a few pixels in place of Inception's."""
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": F.adaptive_avg_pool2d(images.float(), 6).flatten(1)}

    found = Extractor("inception-clean", {"pool": 108}, run, "", "0" * 64, True)
    monkeypatch.setitem(extractors.EXTRACTORS, "inception-clean", lambda *_: found)


@pytest.mark.usefixtures("thumbnails")
def test_copies_score_nothing_and_new_images_about_a_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for folder in ("photos", "drawn", "left-out"):
        (tmp_path / folder).mkdir()
    for number in range(60):
        photo = smooth(random, *SIZES[number % 3])
        photo.save(tmp_path / "photos" / f"{number:03d}.png")
        (tmp_path / "photos" / f"{number:03d}.txt").write_text("a photo")
        central_square(photo).save(tmp_path / "drawn" / f"{number:06d}.png")
        smooth(random, *SIZES[number % 3]).save(tmp_path / "left-out" / f"{number:03d}.png")
    commands = [line for line in PAGE.read_text().splitlines() if "--metrics authenticity" in line]
    assert [shlex.split(line)[2] for line in commands] == ["drawn", "left-out"]
    monkeypatch.chdir(tmp_path)
    scores = []
    for number, line in enumerate(commands):
        given = shlex.split(line)[1:]
        given += [] if "--output" in given else ["--output", f"{number}.json"]
        done = CliRunner().invoke(app, [*given, "--device", "cpu"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        (score,) = json.loads((tmp_path / given[given.index("--output") + 1]).read_text())["metrics"].values()
        scores.append(score)
    assert scores[0] == 0
    assert 0.3 < scores[1] < 0.8
    picture = np.asarray(Image.open(tmp_path / "copies.authenticity.png").convert("RGB")).astype(float)
    pairs = [pair for row in np.split(picture, 2) for pair in np.split(row, 6, axis=1)][:10]
    for pair in pairs:  # each of 256 x 512 pixels in a frame
        drawn, photo = pair[1:257, 1:257], pair[257:513, 1:257]
        assert np.abs(drawn - photo).mean() < 5 < np.abs(drawn - photo[::-1]).mean()

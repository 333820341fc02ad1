"""A run says what it reads and what it leaves out, on the terminal, in its folder and in a dry run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fdistill import distill
from fdistill.base.errors import ConfigError
from fdistill.commands.dry_run import describe
from fdistill.config.reading import load_config
from fdistill.data.account import account_of
from fdistill.data.digits import load_digits
from fdistill.data.source import ArraySource
from fdistill.training.cache import cache
from support.families import dit
from support.files import put

SAID = "60 images in 10 classes (0 -> 0 ... 9 -> 9); left out: 1 image of a format that is not read (.tif), 1 file that"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Digits in class folders, an image of another format, and a text."""
    for number, (image, label) in enumerate(zip(*(part[:60] for part in load_digits()), strict=True)):
        path = put(tmp_path / "set" / str(int(label)) / f"{number}.png")
        Image.fromarray(image[0].numpy()).save(path)
    put(tmp_path / "set" / "9" / "x.tif")
    put(tmp_path / "set" / "notes.txt", "about these digits")
    return tmp_path / "set"


def settings(teacher: Path, data: Path, **more: Any) -> dict[str, Any]:
    quick = {"batch_size": 8, "iterations": 1, "log.samples_every": 0, "log.tracker": "none", "eval.every": 0}
    return {"teacher": str(teacher), "data": str(data), "log.checkpoint_every": 1, **quick, **more}


def test_a_run_prints_and_stores_what_it_reads(
    tiny_teacher: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(tiny_teacher, folder)
    assert f"data           {SAID} is no image (notes.txt)\n" in describe(load_config("digits", chosen))
    assert not (tmp_path / "run").exists()
    distill("digits", output=tmp_path / "run", **chosen)
    assert f"data: {SAID} is no image (notes.txt)\n" in capsys.readouterr().err
    read = json.loads((tmp_path / "run" / "data.json").read_text())
    assert read["summary"].startswith(SAID)
    assert read["classes"] == [str(label) for label in range(10)]
    assert read["left_out"]["images of formats that are not read"] == {"count": 1, "names": ["9/x.tif"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the run began with")
        distill("digits", output=tmp_path / "run", resume=True, **chosen)
        (tmp_path / "run" / "data.json").unlink()  # a run of an earlier version
        distill("digits", output=tmp_path / "run", resume=True, **chosen)
    next((folder / "3").iterdir()).unlink()
    with pytest.warns(UserWarning, match="the run began with 60 images .* and its data are now 59 images"):
        distill("digits", output=tmp_path / "run", resume=True, **chosen)


def test_cached_latents_say_what_they_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = dit(tmp_path / "dit")
    random = np.random.default_rng(0)
    for number in range(120):
        path = put(tmp_path / "set" / str(number % 3) / f"{number}.png")
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    put(tmp_path / "set" / "1" / "broken.png", b"\x89PNG, once")
    put(tmp_path / "set" / "1" / "x.gif")
    said = "121 images in 3 classes (0 -> 0 ... 2 -> 2); left out: 1 image of a format that is not read (.gif)"
    latents = cache(tmp_path / "set", teacher=teacher, output=tmp_path / "latents", workers=1, device="cpu")
    assert f": {said}\n" in capsys.readouterr().err
    meta = json.loads((latents / "latents.json").read_text())
    assert meta["read"]["summary"] == said
    assert meta["count"] == 120
    assert [line.partition(":")[0] for line in meta["unreadable"]] == ["1/broken.png"]
    more = {"guidance_scale": 1.5, "student_level": None, "discriminator.features": ["block1", "block2"]}
    described = describe(load_config("digits", settings(teacher, latents, **more)))
    assert f"data           120 latents of {tmp_path / 'set'}: {said}; 1 could not be decoded\n" in described


def test_the_reference_of_a_run_is_accounted_for_too(tiny_teacher: Path, folder: Path, tmp_path: Path) -> None:
    chosen = settings(tiny_teacher, Path("digits")) | {"eval.every": 1, "eval.num_images": 20}
    chosen |= {"eval.reference": str(folder), "eval.metrics": ["class_accuracy"]}
    with pytest.raises(ConfigError, match=r"more than 1 % .* for distill set eval\.allow_skipped=true"):
        distill("digits", output=tmp_path / "run", **chosen)
    distill("digits", output=tmp_path / "run", **chosen | {"eval.allow_skipped": True})
    read = json.loads((tmp_path / "run" / "data.json").read_text())["eval_reference"]
    assert read["summary"].startswith(SAID)


def test_captions_are_counted() -> None:
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    source = ArraySource("x", images, torch.zeros(3, dtype=torch.long), None, ["a", "b", "a"])
    assert account_of(source).sentence() == "3 images"
    account = account_of(source, captioned=True)
    assert account.sentence() == "3 images, with a caption for each (2 different)"
    assert account.facts()["different_captions"] == 2


def test_data_that_do_not_fit_are_accounted_for(tiny_teacher: Path, folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(folder.rglob("*.png"))[:12]:
        path.rename(flat / path.name)
    put(flat / "x.tif")
    with pytest.raises(ConfigError, match=r"no class labels.*12 images; left out: 1 image of a format .* \(\.tif\)"):
        describe(load_config("digits", settings(tiny_teacher, flat)))

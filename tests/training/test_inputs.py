"""Runs on data of the user's own: folders and archives, resuming, refusals."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from safetensors.torch import load_file

from fdistill import distill, load_teacher
from fdistill.base.errors import CheckpointError, ConfigError, DataError
from fdistill.commands.dry_run import describe
from fdistill.config.reading import load_config
from fdistill.data import load_data
from fdistill.training.build import build
from fdistill.training.inputs import stored_data

QUICK: dict[str, Any] = {
    "batch_size": 8,
    "iterations": 4,
    "log.checkpoint_every": 2,
    "log.samples_every": 0,
    "log.every": 2,
}


def run(teacher: Path, output: Path, data: Path | str, **overrides: object) -> Path:
    resume = bool(overrides.pop("resume", False))
    settings = {"teacher": str(teacher), "data": str(data), **QUICK, **overrides}
    return distill("digits", output=output, resume=resume, **settings)


def weights(student: Path) -> dict[str, torch.Tensor]:
    return load_file(student / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 300 digits as PNG files in class folders, their names in the order of the data set."""
    folder, data = tmp_path_factory.mktemp("digits"), load_data("digits")
    for i in range(300):
        path = folder / str(data.labels[i].item()) / f"{i:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(data.images[i, 0].numpy()).save(path)
    return folder


@pytest.mark.thorough
def test_a_folder_and_an_archive_of_the_same_images_train_alike(
    digits: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """In one order of items the source does not matter: decoded from files by workers, or arrays in memory."""
    files = sorted(digits.rglob("*.png"))
    arrays = np.stack([np.asarray(Image.open(path))[..., None] for path in files])
    np.savez(tmp_path / "digits.npz", images=arrays, labels=np.array([int(path.parent.name) for path in files]))
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        names = [f"00000/{i:08d}.png" for i in range(len(files))]
        for path, name in zip(files, names, strict=True):
            archive.write(path, name)
        labels = [[name, int(path.parent.name)] for path, name in zip(files, names, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    first = weights(run(tiny_teacher, tmp_path / "folder", digits, **{"images.flip": True}))
    for name in ("digits.npz", "digits.zip"):
        other = weights(run(tiny_teacher, tmp_path / f"run-{name}", tmp_path / name, **{"images.flip": True}))
        assert all(torch.equal(first[key], other[key]) for key in first), name
    unflipped = weights(run(tiny_teacher, tmp_path / "unflipped", digits))
    assert any(not torch.equal(first[key], unflipped[key]) for key in first)


@pytest.mark.thorough
def test_resumed_equals_uninterrupted(digits: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    flipped = {"images.flip": True, "images.workers": 1}
    whole = weights(run(tiny_teacher, tmp_path / "whole", digits, **flipped))
    run(tiny_teacher, tmp_path / "parts", digits, iterations=2, **flipped)
    parts = weights(run(tiny_teacher, tmp_path / "parts", digits, resume=True, **flipped))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.thorough
def test_corrupt_images_are_counted_and_too_many_stop_the_run(tiny_teacher: Path, tmp_path: Path) -> None:
    data = load_data("digits")
    for i in range(210):
        path = tmp_path / "images" / str(i % 10) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[i, 0].numpy()).save(path)
    files = sorted((tmp_path / "images").rglob("*.png"))
    files[5].write_bytes(files[5].read_bytes()[:40])
    files[7].write_bytes(b"")
    # 30 iterations of two batches visit every item.
    run(tiny_teacher, tmp_path / "run", tmp_path / "images", iterations=30)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/skipped"] == 2
    files[9].write_bytes(b"x")
    with pytest.raises(DataError, match=rf"3 of 210 images cannot be decoded.*{files[9].name}"):
        run(tiny_teacher, tmp_path / "stopped", tmp_path / "images", iterations=30)


def test_images_of_another_size_need_a_recipe(digits: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    for i in range(10):
        path = tmp_path / "large" / str(i) / "image.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((20, 16, 3), 25 * i, np.uint8)).save(path)
    with pytest.raises(DataError, match="is 16x20, but the teacher's images are 8x8; choose a recipe"):
        run(tiny_teacher, tmp_path / "refused", tmp_path / "large")
    with pytest.raises(DataError, match="is 16x20"):
        describe(load_config("digits", {"teacher": str(tiny_teacher), "data": str(tmp_path / "large")}))
    run(tiny_teacher, tmp_path / "run", tmp_path / "large", **{"images.recipe": "center-box"})
    assert "recipe: center-box" in (tmp_path / "run" / "config.yaml").read_text()


def test_data_that_are_not_the_teachers_are_refused(digits: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    def check(data: object, **changes: object) -> None:
        config = load_config("digits", {"teacher": str(tiny_teacher), "data": str(data), **changes})
        stored_data(build(config, torch.device("cpu")))

    for number in range(11):
        path = tmp_path / "eleven" / f"{number:02d}" / "image.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    with pytest.raises(ConfigError, match=r"has class 10, but teacher .* knows 0 to 9"):
        check(tmp_path / "eleven")
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(flat / "image.png")
    with pytest.raises(ConfigError, match=r"has no class labels, but teacher .* is class-conditional"):
        check(flat)
    np.savez(tmp_path / "rgb.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(ConfigError, match=r"has samples of shape \(3, 32, 32\) \(C, H, W\)"):
        check(tmp_path / "rgb.npz")
    check(tmp_path / "rgb.npz", **{"images.recipe": "center-box"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="image"):
        check(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file"):
        check(tmp_path / "nowhere")


class Gated(GatedRepoError):
    """The hub's own error wants a response, of a class that differs between its versions."""

    def __init__(self) -> None:
        Exception.__init__(self, "gated")


def test_a_gated_hub_id_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise Gated

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    message = r"accept the conditions on huggingface\.co/owner/model, run `hf auth login`"
    with pytest.raises(CheckpointError, match=message):
        load_teacher("owner/model")


def test_nothing_is_decoded_where_training_runs() -> None:
    with pytest.raises(ConfigError, match=r"images\.workers"):
        load_config("digits", {"images.workers": 0})


def test_a_pipeline_without_its_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    with pytest.raises(CheckpointError, match=r"expected config\.json of the network in it, or in unet/"):
        load_teacher(tmp_path)

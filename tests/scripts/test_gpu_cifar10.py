"""The CIFAR-10 comparison for a GPU, as a machine without one can run it: all of it, small, on made-up images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdistill import load_student, load_teacher
from fdistill.base.images import to_unit
from fdistill.data import open_source
from fdistill.data.npz import open_npz

pytestmark = pytest.mark.thorough  # what is tried here takes a minute

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "gpu_cifar10.sh"


def call(out: Path, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHON": sys.executable, "WORK": str(work), "CIFAR10": str(work / "none.npz")}
    command = ["bash", str(SCRIPT), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cifar10")
    out, work = folder / "out", folder / "work"
    done = call(out, work, "--quick")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, work


def test_every_number_and_picture_is_there(run: tuple[Path, Path]) -> None:
    out, _ = run
    result = json.loads((out / "results.json").read_text())
    assert "not FID" in result["what"]
    names = ["reverse-kl", "forward-kl", "jensen-shannon"]
    drawn = ["teacher, 17 evaluations", "teacher, 35 evaluations", *(f"student, {name}" for name in names)]
    assert list(result["distances"]) == ["test images", *drawn]
    for name in drawn:
        row = result["distances"][name]
        assert row["frechet_train"] > 0
        assert row["frechet_test"] > 0
        assert 0 <= row["class_accuracy"] <= 1
        assert row["images_per_second"] > 0
    for name in names:
        assert result[f"student-{name}"]["iterations"] >= 8
        assert result[f"student-{name}"]["minutes"] > 0
    assert 0 <= result["features"]["test_accuracy"] <= 1
    assert result["teacher"]["losses"]
    assert result["machine"]["torch"] == torch.__version__
    files = sorted(path.name for path in out.iterdir())
    assert files == [*sorted(f"curves-{name}.png" for name in names), "log.txt", "results.json", "samples.png"]
    assert len(files) <= 8
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_its_teacher_and_students_are_ordinary_ones(run: tuple[Path, Path]) -> None:
    _, work = run
    teacher, student = load_teacher(work / "teacher"), load_student(work / "student-forward-kl")
    assert teacher.sample_shape == (3, 16, 16)
    assert student.levels == (2.5,)
    assert teacher.num_classes == student.num_classes == 10
    source = open_npz(work / "train.npz")
    x0, labels = to_unit(source.images[:64]), source.labels[:64]
    x_t = x0 + 0.5 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    error = (teacher.denoise(x_t, torch.full((64,), 0.5), labels) - x0).square().mean().sqrt()  # type: ignore[operator]
    assert error < 0.4  # the noise is 0.5; weights that are not those that were trained make it worse


def test_images_and_labels_survive_the_conversion(run: tuple[Path, Path]) -> None:
    _, work = run
    source = open_source(str(work / "train.npz"))
    assert (len(source), source.num_classes) == (400, 10)
    archive = np.load(work / "made-up-train.npz")
    assert source.labels.tolist() == archive["labels"].tolist()
    first, last = (archive["jpeg"][archive["offsets"][i] : archive["offsets"][i + 1]] for i in (0, 399))
    for index, content in ((0, first), (399, last)):
        (work / "one.jpg").write_bytes(content.tobytes())
        with Image.open(work / "one.jpg") as image:
            assert np.array_equal(np.asarray(image), np.asarray(source.encoded(index)))


def test_stages_that_are_done_are_kept_and_missing_ones_named(run: tuple[Path, Path], tmp_path: Path) -> None:
    _, work = run
    stamp = (work / "teacher").stat().st_mtime_ns
    done = call(tmp_path / "again", work, "data", "teacher", "students", "--quick")
    assert done.returncode == 0, done.stderr
    assert "-- " not in done.stdout
    assert (work / "teacher").stat().st_mtime_ns == stamp
    done = call(tmp_path / "none", tmp_path / "empty", "report", "--quick")
    assert done.returncode != 0
    assert "report: data, features, teacher, student-reverse-kl" in done.stdout


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    done = call(tmp_path / "out", tmp_path / "work")
    assert done.returncode != 0
    wanted = "none.npz: no such file" if torch.cuda.is_available() else "no CUDA GPU is visible"
    assert wanted in done.stderr

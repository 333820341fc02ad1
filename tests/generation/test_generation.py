from __future__ import annotations

import json
from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fdistill import distill, generate
from fdistill.base.errors import ArgumentError, CheckpointError, OutputError
from fdistill.base.files import claimed_folder
from fdistill.base.rng import indexed_normal
from fdistill.generation import batch_size
from fdistill.generation.image_files import image_files
from fdistill.students.folder import load_student


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("generation") / "run"
    return distill("digits", output=output, teacher=str(tiny_teacher), batch_size=8, iterations=1)


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def test_files_and_manifest(student: Path, tmp_path: Path) -> None:
    folder = generate(student, num_images=7, seed=3, output=tmp_path / "images", class_labels=[4, 9])
    assert sorted(p.name for p in folder.iterdir()) == [*(f"{i:06d}.png" for i in range(7)), "manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["labels"] == [4, 9, 4, 9, 4, 9, 4]
    assert (manifest["seed"], manifest["kind"], manifest["evaluations_per_image"]) == (3, "student", 1)
    assert manifest["checkpoint"] == str(student)
    assert manifest["images_per_second"] > 0


def test_image_i_depends_on_seed_and_i_alone(student: Path, tmp_path: Path) -> None:
    many = read(generate(student, num_images=20, seed=3, output=tmp_path / "many"))
    few = read(generate(student, num_images=11, seed=3, output=tmp_path / "few", batch_size=3))
    assert np.abs(many[:11] - few).max() <= 1  # float rounding may differ with the batch, by a level at most
    assert (many[:11] != few).mean() < 0.01
    other = read(generate(student, num_images=20, seed=4, output=tmp_path / "other"))
    assert (many != other).mean() > 0.5


def test_pixels_are_the_students(student: Path, tmp_path: Path) -> None:
    images = read(generate(student, num_images=10, seed=0, output=tmp_path / "images"))
    x0 = load_student(student)(indexed_normal(0, range(10), (1, 8, 8)), torch.arange(10))
    expected = (x0.clamp(-1, 1) * 127.5 + 127.5).round()[:, 0].numpy()
    assert np.array_equal(images, expected)


def test_a_teacher_is_sampled_with_its_steps(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = generate(tiny_teacher, num_images=2, output=tmp_path / "teacher", num_steps=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["evaluations_per_image"]) == ("teacher", 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_images": 0}, ArgumentError, "num_images: expected at least 1, got 0"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"class_labels": [3, 10]}, ArgumentError, "class_labels: got 10, expected 0 to 9"),
        ({"class_labels": [-1]}, ArgumentError, "class_labels: got -1"),
        ({"guidance_scale": 2.0, "resolution": 16}, ArgumentError, "^guidance_scale, resolution: .* leave them out"),
        ({"network": "nowhere:f"}, CheckpointError, "network: got 'nowhere:f', but .* holds its network itself"),
        ({"sampler": "pipeline", "num_steps": 4}, ArgumentError, "^steps: .* is a student, whose pipeline is"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    student: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(student, **({"num_images": 2, "output": tmp_path / "images"} | changes))  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_bad_places_are_refused(student: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not an empty folder"):
        generate(student, num_images=1, output=tmp_path / "taken")
    with pytest.raises(OutputError, match="cannot write"):
        generate(student, num_images=1, output=tmp_path / "taken" / "letter.txt" / "below")
    with pytest.raises(CheckpointError, match="no such folder"):
        generate(tmp_path / "nowhere", num_images=1, output=tmp_path / "images")
    with pytest.raises(ArgumentError, match="steps"):
        generate(tiny_teacher, num_images=1, num_steps=0, output=tmp_path / "images")
    with pytest.raises(ArgumentError, match=r"network: applies only to students of your own network"):
        generate(tiny_teacher, num_images=1, network="nowhere:f", output=tmp_path / "images")
    with pytest.raises(ArgumentError, match=r"negative_prompt: applies only to a text-to-image teacher with guidance"):
        generate(tiny_teacher, num_images=1, negative_prompt="a cat", output=tmp_path / "images")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_a_second_job_with_the_same_output_is_refused_at_once(student: Path, tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "images"), pytest.raises(OutputError, match=r"images: process \d+ on .* is writing"):
        generate(student, num_images=1, output=tmp_path / "images")
    assert not any(tmp_path.iterdir())


def test_bfloat16_is_close_and_noted(student: Path, tmp_path: Path) -> None:
    plain = read(generate(student, num_images=8, output=tmp_path / "plain"))
    folder = generate(student, num_images=8, output=tmp_path / "bf16", precision="bf16")
    assert json.loads((folder / "manifest.json").read_text())["precision"] == "bf16"
    assert 0 < np.abs(plain - read(folder)).max() <= 12  # of 255
    with pytest.raises(ArgumentError, match="precision: got 'fp16'"):
        generate(student, num_images=1, output=tmp_path / "half", precision="fp16")


@pytest.mark.thorough  # compiling takes a quarter of a minute
def test_compiled_networks_make_the_same_images(
    student: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counting))
    for each in (student, tiny_teacher):
        torch._dynamo.reset()
        plain = read(generate(each, num_images=9, output=tmp_path / f"{each.name}-plain", batch_size=8))
        assert not compiled
        folder = generate(each, num_images=9, output=tmp_path / f"{each.name}-compiled", batch_size=8, compiled=True)
        assert compiled
        assert np.abs(plain - read(folder)).max() <= 1
        compiled.clear()


def test_a_batch_size_that_is_tried_makes_the_same_images(student: Path, tmp_path: Path) -> None:
    plain = read(generate(student, num_images=20, output=tmp_path / "plain"))
    folder = generate(student, num_images=20, output=tmp_path / "tried", batch_size=None)
    assert 1 <= json.loads((folder / "manifest.json").read_text())["batch_size"] <= 20
    assert np.abs(plain - read(folder)).max() <= 1


def test_doubling_ends_where_it_brings_nothing_or_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(batch_size.time, "perf_counter", lambda: clock[0])

    def make(size: int) -> None:
        if size > limit:
            raise torch.OutOfMemoryError
        clock[0] += 1.0 + max(size, full) / full  # a second for each start

    full, limit = 16, 10**6
    assert 32 <= batch_size.fastest(make, 10**6) < 10**4
    assert batch_size.fastest(make, 8) == 8
    limit = 5
    assert batch_size.fastest(make, 256) == 4


def test_a_batch_that_waits_for_another_program_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], Counter[int]()
    monkeypatch.setattr(batch_size.time, "perf_counter", lambda: clock[0])

    def make(size: int) -> None:
        calls[size] += 1
        clock[0] += 0.1 + 0.001 * size
        if (size, calls[size]) in {(2, 2), (8, 3)} or size == 16:  # 16 is slow at all times
            clock[0] += 0.3

    assert batch_size.fastest(make, 64) == 64


#: Of a GPU nothing is needed here but its name.
DEVICES = [torch.device("cpu"), torch.device("cuda")]


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_that_cannot_be_written_is_named(tmp_path: Path, device: torch.device) -> None:
    (tmp_path / "000001.png").mkdir()
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(IsADirectoryError, match=r"000001\.png"), image_files(tmp_path, device) as files:
        files.write(range(3), images)


@pytest.mark.parametrize("device", DEVICES)
def test_every_image_is_written_under_its_number(tmp_path: Path, device: torch.device) -> None:
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 1, 2, 2)
    with image_files(tmp_path, device) as files:
        for first in range(0, 100, 40):
            files.write(range(100)[first : first + 40], images[first : first + 40])
    assert read(tmp_path)[:, 0, 0].tolist() == list(range(100))

"""A student leaves the house: plain diffusers runs it, and draws what the trainer drew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fdistill import distill, load_student
from fdistill.base.errors import CheckpointError
from fdistill.students.folder import find_student

OUTSIDE = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
images = pipeline(batch_size=5, class_labels=[0, 3, 5, 7, 9], num_inference_steps=1,
                  generator=torch.Generator().manual_seed(4), output_type="np").images
numpy.save(sys.argv[2], images)
assert not any(name.split(".")[0] == "fdistill" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "run"
    return distill("digits", output=output, teacher=str(tiny_teacher), batch_size=8, iterations=2)


@pytest.mark.thorough
def test_plain_diffusers_draws_the_trainers_sample(student: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", OUTSIDE, str(student), str(tmp_path / "out.npy")], check=True, cwd=tmp_path)
    images = np.load(tmp_path / "out.npy")  # [5, 8, 8, 1] in [0, 1]
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    x0 = load_student(student)(noise, torch.tensor([0, 3, 5, 7, 9]))
    expected = (x0.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected - 0.5).max() > 0.1
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_the_folder_says_what_it_is(student: Path) -> None:
    assert find_student(student) == find_student(student.parent) == student
    facts = json.loads((student / "fdistill_student.json").read_text())
    assert facts["levels"] == [2.5]
    assert facts["method"] == "f-distill"
    assert facts["divergence"] == "jensen-shannon"
    assert facts["iterations"] == 2
    card = (student / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in card
    assert "| divergence | jensen-shannon |" in card
    assert not list(student.rglob("*.bin"))
    assert not list(student.rglob("*.pt"))


def test_a_run_folder_stands_for_its_student(student: Path) -> None:
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(load_student(student.parent)(noise, labels), load_student(student)(noise, labels))


def test_what_is_not_a_student_is_refused(tiny_teacher: Path, tmp_path: Path, student: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no fdistill_student\.json"):
        load_student(tiny_teacher)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_student(tmp_path / "nowhere")

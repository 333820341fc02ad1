"""The example of docs/teachers.md, as it stands there, distilled and used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdistill import distill, generate, load_student, load_teacher
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.base.errors import CheckpointError

EXAMPLE = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent.parent / "docs" / "teachers.md").read_text(), re.DOTALL
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_teacher_module.py").write_text(EXAMPLE[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_teacher_module", None)
    return "own_teacher_module:teacher"


def test_the_example_is_short() -> None:
    assert len(EXAMPLE) == 1
    assert len(EXAMPLE[0].splitlines()) <= 30


def test_a_function_of_ones_own_is_a_teacher(module: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = distill(
        "digits", output=tmp_path / "run", teacher=module, batch_size=8, iterations=3, **{"log.samples_every": 0}
    )
    with pytest.raises(CheckpointError, match=r"pass network='module:function' \(it was trained as"):
        load_student(student)
    generator = load_student(student, network=module)
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert generator(noise, labels).shape == (4, 1, 8, 8)
    images = generate(student, num_images=3, output=tmp_path / "images", network=module)
    assert len(list(images.glob("*.png"))) == 3


def test_a_students_folder_cannot_choose_what_runs(module: str, tmp_path: Path) -> None:
    student = distill("digits", output=tmp_path / "run", teacher=module, batch_size=8, iterations=1)
    path = student / "fdistill_student.json"
    path.write_text(path.read_text().replace(module, "os:getcwd"))
    with pytest.raises(CheckpointError, match="os:getcwd"):
        load_student(student)
    assert load_student(student, network=module).levels == (2.5,)


def test_its_samples_may_stand_for_data(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are cached by the weights, numbers without dimensions among them."""
    own = load_teacher(module)
    own.register_parameter("gain", torch.nn.Parameter(torch.tensor(1.0)))
    one = Checkpoint(module, factory=lambda: own).fingerprint(own)
    own.get_parameter("gain").data.mul_(2)
    assert Checkpoint(module, factory=lambda: own).fingerprint(own) != one
    settings = {"data": "teacher-samples", "teacher_samples.count": 8, "teacher_samples.num_steps": 2}
    distill("digits", output=tmp_path / "run", teacher=module, batch_size=8, iterations=1, **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:teacher", "ModuleNotFoundError"),
        ("own_teacher_module:absent", "AttributeError"),
        ("os:getcwd", r"returned a str; expected a fdistill\.Denoiser"),
    ],
)
def test_functions_that_are_none(module: str, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_teacher(name)


@pytest.mark.thorough
def test_it_works_from_the_command_line(module: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fdistill",
        "distill",
        "digits",
        f"teacher={module}",
        "batch_size=8",
        "iterations=1",
    ]
    done = subprocess.run([*command, "--output", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "fdistill", "generate", "run", "--num-images", "2", "--output", "images"]
    done = subprocess.run([*command, "--network", module], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "images" / "000001.png").is_file()


def test_tied_weights_are_saved_and_loaded(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = EXAMPLE[0].replace(
        "    return MyDenoiser()", "    made = MyDenoiser()\n    made.twin = made.first\n    return made"
    )
    (tmp_path / "tied_teacher_module.py").write_text(tied)
    name = "tied_teacher_module:teacher"
    student = distill("digits", output=tmp_path / "run", teacher=name, batch_size=8, iterations=1)
    assert load_student(student, network=name).levels == (2.5,)
    weights = student / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"network\.safetensors has [0-9,]+ bytes"):
        load_student(student, network=name)

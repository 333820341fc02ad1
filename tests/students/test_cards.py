"""The call in every student's model card is run as it stands, and draws what the student draws in fdistill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fdistill import generate, load_student
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.condition import Condition
from fdistill.generator import Student, student_generator
from fdistill.students.folder import save_student
from fdistill.students.tiue import TiUEGenerator
from fdistill.teachers.autoencoder import attach_latent_space
from fdistill.teachers.teacher import Teacher, TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import open_prompt_encoder
from support.families import FAMILIES
from support.text_families import RESOLUTION, TEXT_FAMILIES, sd3, sd3_without_t5, sd15
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.thorough import at_night

TEXT = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}
WRITERS = {
    **{name: row[0] for name, row in (FAMILIES | TEXT).items()},
    "sd3-without-t5": sd3_without_t5,
    "sd15-few-steps": sd15,
    "sd3-few-steps": sd3,
    "sd15-tiue": sd15,
}
#: Where the student starts, if not at the teacher's noisiest level; there, rounding of eps grows 15-fold and more.
LEVELS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("sdxl", "sd15", "pixart", "pixart-alpha", "dit", "ddpm", "learned-variance"), (399.0,)),
    "sd15-few-steps": (399.0, 199.0),
    "sd3-few-steps": (1.0, 0.5),
}
#: Runs each card's lines; noise is drawn from a generator that is seeded before the last one.
OUTSIDE = """
import json, sys, numpy, torch
for job in json.load(open(sys.argv[1])):
    *before, last = job["lines"]
    scope = {}
    try:
        exec("\\n".join(before), scope)
        scope["pipeline"].set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        exec(last, scope)
    except Exception as error:
        raise SystemExit(f"{job['name']}: {error!r}")
    images = [scope["image"]] if "image" in scope else scope["images"]
    numpy.save(job["output"], numpy.stack([numpy.asarray(image) for image in images]))
    assert job["own"] or "fdistill" not in sys.modules, job["name"]
"""


def exported(name: str, base: Path) -> tuple[Path, Teacher]:
    """An untrained student of a family in a folder."""
    folder = WRITERS[name](base / "teachers" / name)
    size = TEXT[name][2].get("height", RESOLUTION) if name in TEXT else RESOLUTION
    resolution = None if name in FAMILIES else size
    teacher = open_teacher(TeacherSettings(str(folder), resolution=resolution))
    denoiser = teacher.denoiser
    student: Student
    if name.endswith("tiue"):
        student = TiUEGenerator(denoiser, (999.0, 749.0))
    else:
        student = student_generator(denoiser, LEVELS.get(name, (denoiser.schedule.t_max,)))
    output = base / "students" / name
    save_student(
        student.eval(),
        output,
        origin=teacher.checkpoint,
        latents=teacher.latents,
        card={"teacher": name},
        config=None,
        samples=None,
    )
    return output, teacher


#: Those that a day tries: pipelines of diffusers and of our own, told classes and told prompts.
BY_DAY = ("edm-ddpmpp", "dit", "sd3-without-t5", "sd15-tiue")


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("cards")
    by_day = request.config.getoption("markexpr") == "not thorough"
    return {name: exported(name, base)[0] for name in (BY_DAY if by_day else WRITERS)}


@pytest.fixture(scope="module")
def drawn(students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> images, from one process that imports fdistill only where a card does."""
    base = tmp_path_factory.mktemp("drawn")
    jobs: list[dict[str, Any]] = []
    for name, folder in students.items():
        (block,) = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
        lines = block.replace("path/to/this/folder", str(folder)).splitlines()
        jobs.append({"name": name, "lines": lines, "output": str(base / f"{name}.npy"), "own": "fdistill" in block})
    jobs.sort(key=lambda job: job["own"])
    assert not jobs[0]["own"]
    (base / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(base / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=base,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {job["name"]: np.load(job["output"]) for job in jobs}


@pytest.mark.parametrize("name", at_night(WRITERS, lambda name: name not in BY_DAY))
def test_the_cards_call_draws_what_the_student_draws(
    name: str, students: dict[str, Path], drawn: dict[str, Any]
) -> None:
    folder, found = students[name], drawn[name]
    student = load_student(folder)
    condition: Condition | None = None
    if student.denoiser.text_shapes is not None:
        resolution = found.shape[1]
        condition = open_prompt_encoder(Checkpoint(name, folder), resolution).encode(["a prompt"])
    elif student.num_classes:
        condition = torch.full((len(found),), 3)
    latents = attach_latent_space(student.denoiser, Checkpoint(name, folder), None)
    torch.manual_seed(0)
    shape = student.noise_shape()
    noise = torch.randn(len(found), *shape)
    with torch.no_grad():
        x0 = student(noise, condition)
    images = x0 if latents is None else latents.decode(x0)
    expected = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).mul(255).numpy()
    assert expected.std() > 3
    assert np.abs(found.reshape(expected.shape) - expected).max() < 1.5


def test_generate_draws_from_a_student_without_t5(students: dict[str, Path], tmp_path: Path) -> None:
    made = generate(
        students["sd3-without-t5"],
        num_images=1,
        prompts=["a prompt"],
        sampler="pipeline",
        output=tmp_path / "images",
    )
    with Image.open(next(made.glob("*.png"))) as image:
        assert image.size == (RESOLUTION, RESOLUTION)

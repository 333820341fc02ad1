"""What earlier versions wrote still loads, draws what it drew, and trains on: tests/fixtures/first-layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import fdistill
from fdistill.base.rng import indexed_normal

FIRST = Path(__file__).parent.parent / "fixtures" / "first-layout"
#: A student -> the arguments that its pipeline takes besides those its folder names.
STUDENTS: dict[str, dict[str, Any]] = {
    "run": {"class_labels": [0, 0], "batch_size": 2},
    "resumed": {"class_labels": [0, 0], "batch_size": 2},
    "few-step": {"class_labels": [0, 0], "batch_size": 2},
    "edm-run": {"class_labels": [0, 0]},
    "tiue": {"batch_size": 2},
    "lora": {"prompt": ["a bold seven", "a thin digit"]},
}


#: Its tokenizer was saved by transformers 5, in a form that 4 does not read.
READS_TOKENIZER = int(transformers.__version__.split(".")[0]) >= 5
WITH_PROMPTS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "lora" and not READS_TOKENIZER, reason="a tokenizer of transformers 5")
    )
    for name in STUDENTS
]


def noise_of(student: Any) -> Tensor:
    return indexed_normal(0, range(2), student.noise_shape())


def weights(student: Path) -> dict[str, Tensor]:
    return load_file(student / "unet" / "diffusion_pytorch_model.safetensors")


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """One float32 network on two machines: a few times 1e-7 of the largest value apart, wherever the kernels differ."""
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * expected.abs().max().clamp(min=1).item())


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_makes_what_it_made(name: str) -> None:
    student = fdistill.load_student(FIRST / name)
    with torch.no_grad():
        made = student(noise_of(student), student.denoiser.example_condition(2, "cpu"))
    expected = load_file(FIRST / "expected.safetensors")[name]
    assert expected.std() > 0.1
    assert_alike(made, expected)


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_diffusers_loads_and_runs_it(name: str) -> None:
    folder = FIRST / name / "student"
    facts = json.loads((folder / "fdistill_student.json").read_text())
    if facts["pipeline"] in fdistill.__all__:
        getattr(fdistill, facts["pipeline"])  # as the student's card says: importing it makes it known to diffusers
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == facts["pipeline"]
    draws = torch.Generator().manual_seed(4)
    images = pipeline(**STUDENTS[name], **facts["call"], generator=draws, output_type="np").images
    assert images.shape[0] == 2
    assert np.isfinite(images).all()
    if name == "lora":
        return  # its prompts are encoded on the way; what the network makes of them is tested above
    student = fdistill.load_student(folder)
    draws = torch.Generator().manual_seed(4)
    noise = torch.stack([torch.randn(2, *student.sample_shape, generator=draws) for _ in student.levels], 1)
    labels = torch.tensor([0, 0]) if student.num_classes else None
    expected = student(noise if len(student.levels) > 1 else noise[:, 0], labels)
    # The scheduler works out levels and coefficients by itself.
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_it_generates(name: str, tmp_path: Path) -> None:
    told: dict[str, Any] = {"prompts": ["a bold seven"]} if name == "lora" else {}
    if "class_labels" in STUDENTS[name]:
        told = {"class_labels": [0]}
    folder = fdistill.generate(FIRST / name, num_images=2, output=tmp_path / "images", seed=0, **told)
    images = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(2)]).astype(float)
    if name == "lora":
        assert images.shape == (2, 16, 16, 3)
        assert images.std() > 0
        return
    x0 = load_file(FIRST / "expected.safetensors")[name][:, 0].numpy()
    assert np.abs(images - (x0.clip(-1, 1) * 127.5 + 127.5)).max() < 0.5 + 0.02  # a level of rounding


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, gone on with from iteration 3 to 6."""
    folder = tmp_path_factory.mktemp("first-layout")
    shutil.copytree(FIRST / "teacher", folder / "teacher")
    shutil.copytree(FIRST / "run", folder / "run")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)  # where its config says that its teacher is
        own = str(Path("run") / "config.yaml")  # what digits is today has other settings
        fdistill.distill(own, output="run", resume=True, iterations=6)
    return folder / "run"


def test_a_run_goes_on_where_it_was(resumed: Path) -> None:
    before = (FIRST / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert records[:3] == [json.loads(line) for line in before]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]

    start, then, now = (weights(folder / "student") for folder in (FIRST / "run", FIRST / "resumed", resumed))
    assert now.keys() == then.keys()
    moved, apart = (
        torch.cat([(first[name] - second[name]).flatten() for name in then]).norm()
        for first, second in ((then, start), (now, then))
    )
    assert moved > 1e-3
    # Adam steps by the gradient's sign where the gradient itself is rounding, so a few weights go their own way.
    assert apart < 0.02 * moved


def test_its_average_is_reconstructed(tmp_path: Path) -> None:
    student = fdistill.reconstruct_student(FIRST / "run", sigma_rel=0.12, output=tmp_path / "posthoc")
    found, expected, stored = weights(student), weights(FIRST / "posthoc"), weights(FIRST / "run" / "student")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)  # a sum of float32 weights
    assert any((stored[name] - value).abs().max() > 1e-5 for name, value in expected.items())
    assert fdistill.load_student(student)(torch.zeros(1, 1, 8, 8), torch.tensor([3])).shape == (1, 1, 8, 8)

"""DiT and SiT against outputs of their published code, the guided ones included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fdistill.adapters.checkpoint import load_teacher
from fdistill.guidance import GuidedDenoiser
from fdistill.teachers.convert import convert
from fdistill.teachers.convert_dit import Given
from support.tolerances import assert_rounded

ARRAYS = Path(__file__).parent / "arrays"
TIMES = {"dit": ("1", "100", "500", "900", "999"), "sit": ("0.02", "0.25", "0.5", "0.9", "0.99")}


@pytest.fixture(scope="module", params=["dit", "sit"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = ARRAYS / "dit-and-sit-weights.safetensors"
    return convert(source, tmp_path_factory.mktemp("teachers") / family, family, given=Given(10))


def recorded_x0(family: str, x_t: Tensor, output: Tensor, time: str) -> Tensor:
    """The published output as x0, by the formulas of its paper in float64."""
    x_t, output = x_t.double(), output.double()
    if family == "dit":  # eps; betas are linear from 1e-4 to 0.02 in 1,000 steps
        signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[int(time)]
        return (x_t - (1 - signal) ** 0.5 * output) / signal**0.5
    return x_t + (1 - float(time)) * output  # x_t = t x0 + (1 - t) eps, output = x0 - eps


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("kind", ["output", "output_null", "guided"])
def test_x0_is_that_of_the_published_code(family: str, folder: Path, kind: str, place: int) -> None:
    arrays, time = np.load(ARRAYS / f"{family}-outputs.npz"), TIMES[family][place]
    x_t, labels = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["labels"])
    teacher = load_teacher(folder)
    t = torch.full((3,), float(time) if family == "dit" else 1 - float(time))
    if kind == "output_null":
        assert teacher.null_class == int(arrays["null_label"])
        labels = torch.full_like(labels, teacher.null_class)
    denoiser = GuidedDenoiser(teacher, float(arrays["guidance_scale"])) if kind == "guided" else teacher
    with torch.no_grad():
        found = denoiser(x_t, t, labels)
    expected = recorded_x0(family, x_t, torch.from_numpy(arrays[f"{kind}_t{time}"]), time)
    assert_rounded(found.double(), expected)


def test_guidance_leaves_the_fourth_channel_as_it_is(family: str, folder: Path) -> None:
    teacher = load_teacher(folder)
    x_t, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, 4, 7])
    t = torch.full((3,), teacher.schedule.t_max / 2)
    with torch.no_grad():
        plain, guided = teacher(x_t, t, labels), GuidedDenoiser(teacher, 4.0)(x_t, t, labels)
        teacher.guidance_channels = None
        everywhere = GuidedDenoiser(teacher, 4.0)(x_t, t, labels)
    assert_rounded(guided[:, 3], plain[:, 3])
    assert (everywhere[:, 3] - plain[:, 3]).abs().max() > 0.01
    assert_rounded(guided[:, :3], everywhere[:, :3])

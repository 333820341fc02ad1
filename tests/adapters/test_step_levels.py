"""Levels of `student.steps`: published lists, and the sigmas that diffusers' own schedulers make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from fdistill.adapters.parametrisation import DirectPrediction, EDMPreconditioning
from fdistill.adapters.step_levels import step_levels
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.noise import EDMSchedule, FlowSchedule, vp_schedule_from_config
from fdistill.training.build import build
from support.denoisers import tiny_unet


def denoiser(form: Any, side: int = 8) -> UNet2DDenoiser:
    return UNet2DDenoiser(tiny_unet(sample_size=side, num_class_embeds=None), form)


FLOW = DirectPrediction(FlowSchedule(), "flow", 1000.0)
FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
QWEN = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}


@pytest.mark.parametrize(
    ("scheduler", "shift", "published"),
    [
        ({}, None, (1, 0.75, 0.5, 0.25)),
        ({}, 1.0, (1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)),
        ({"shift": 3.0}, None, (1, 0.9, 0.75, 0.5)),  # SD3, Z-Image-Turbo, Qwen-Image-Lightning
        ({"flow_shift": 3.0}, None, (1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3)),
        ({"shift": 3.0}, 5.0, (1, 0.9375, 0.8333, 0.625)),  # Wan
        (FLUX, None, (1, 0.9045, 0.7595, 0.5128)),
        (FLUX, None, (1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109)),
        (QWEN, None, (1, 0.8571, 0.6668, 0.4001)),  # its scheduler would stretch the last one to 0.02
    ],
)
def test_flows_of_4096_tokens(scheduler: dict[str, Any], shift: float | None, published: tuple[float, ...]) -> None:
    config = {**FlowMatchEulerDiscreteScheduler().config, **scheduler}
    if "flow_shift" in scheduler:
        config = scheduler
    found = step_levels(denoiser(FLOW, 128), len(published), scheduler=config, shift=shift)
    assert found == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("side", [32, 128])
def test_a_shift_by_tokens_is_the_schedulers_own(kind: str, side: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX, time_shift_type=kind)
    tokens = (side // 2) ** 2
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=calculate_shift(tokens))
    found = step_levels(denoiser(FLOW, side), 6, scheduler=scheduler.config)
    assert (*found, 0.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-5)


def test_timesteps() -> None:
    vp = denoiser(DirectPrediction(vp_schedule_from_config({"_class_name": "DDPMScheduler"}), "eps"))
    assert step_levels(vp, 4) == (999, 749, 499, 249)  # DMD2's
    assert step_levels(vp, 1) == (999,)
    assert step_levels(vp, 2, start=399.0) == (399, 199)
    with pytest.raises(ConfigError, match=r"student.shift: got 3, but the teacher is no flow; expected null"):
        step_levels(vp, 4, shift=3.0)


def test_the_karras_grid() -> None:
    edm = denoiser(EDMPreconditioning(EDMSchedule(), 0.5, boundary=0.0, time_scale=0.25))
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(5)  # with both ends
    assert (*step_levels(edm, 4), 0.002) == pytest.approx(scheduler.sigmas[:5].tolist(), rel=1e-4)
    assert step_levels(edm, 2, start=2.5)[0] == 2.5
    third = ((2.5 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert step_levels(edm, 2, start=2.5)[1] == pytest.approx(third, rel=1e-4)


def test_a_run_takes_them(tiny_teacher: Path) -> None:
    settings: dict[str, Any] = {"teacher": str(tiny_teacher), "student.steps": 3, "student_level": 2.5}
    made = build(load_config("digits", settings), torch.device("cpu"))
    assert made.student.levels == pytest.approx(step_levels(made.networks.teacher, 3, start=2.5))
    assert len(made.student.levels) == 3

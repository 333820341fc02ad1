"""Levels of `student.steps`: published lists, and the sigmas that diffusers' own schedulers make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from fdistill.adapters import wrap
from fdistill.adapters.parametrisation import DirectPrediction, EDMPreconditioning, scheduler_config
from fdistill.adapters.step_levels import step_levels
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.noise import EDMSchedule, FlowSchedule, vp_schedule_from_config
from fdistill.training.build import build
from support.denoisers import tiny_unet
from support.text_families_flux2 import HAS_FLUX2


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


FLUX2_STEPS = [
    (64, (1, 0.9674, 0.9081, 0.7672)),
    (64, (1, 0.9854, 0.9666, 0.9415, 0.9062, 0.8528, 0.763, 0.5798)),
    (32, None),
    (80, None),  # more tokens than mu depends on steps for
]


@pytest.mark.skipif(not HAS_FLUX2, reason="this diffusers has no FLUX.2")
@pytest.mark.parametrize(("side", "published"), FLUX2_STEPS)
def test_flux_2_is_shifted_by_tokens_and_steps(side: int, published: tuple[float, ...] | None) -> None:
    """Against the pipelines' own mu, and what their scheduler makes of it."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    from fdistill.adapters.flux2 import tiny_transformer

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    made = wrap(tiny_transformer(), scheduler_config(scheduler))
    made.resize(side, side)
    for steps in (len(published),) if published else (1, 3, 50):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(side**2, steps))
        found = step_levels(made, steps, scheduler=scheduler.config)
        assert (*found, 0.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
        assert published is None or found == pytest.approx(published, abs=1e-4)


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

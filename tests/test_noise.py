from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.noise import (
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    VPSchedule,
    add_noise,
    karras_levels,
    lognormal_levels,
    noise_to_signal,
    uniform_levels,
    vp_schedule_from_config,
)
from fdistill.prediction import PredictionKind
from support.predictions import from_x0, to_x0

VP_CONFIGS = {
    "linear": {"beta_schedule": "linear"},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-terminal-snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}
SCHEDULES: dict[str, NoiseSchedule] = {
    "edm": EDMSchedule(),
    "flow": FlowSchedule(),
    **{name: vp_schedule_from_config(config) for name, config in VP_CONFIGS.items()},
}


def ends_and_middle(schedule: NoiseSchedule) -> torch.Tensor:
    low, high = schedule.t_min, schedule.t_max
    return torch.tensor([low, low + 0.01 * (high - low), (low + high) / 2, low + 0.99 * (high - low), high])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 4e-15), (torch.float32, 4e-7)])
def test_predictions_round_trip_at_both_ends(
    name: str, kind: PredictionKind, dtype: torch.dtype, rounding: float
) -> None:
    schedule = SCHEDULES[name]
    t = ends_and_middle(schedule).to(dtype)
    if kind == "eps":  # x0 is not defined by it where nothing of the signal is left
        t = t[schedule.alpha(t) > 0]
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(len(t), 3, 4, 4, generator=generator, dtype=dtype) for _ in range(2))
    x_t = add_noise(schedule, x0, noise, t)
    a, s = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    truth = {"x0": x0, "eps": noise, "v": a * noise - s * x0, "flow": noise - x0}[kind]
    size = 4 * (a + s)  # of x_t: all that may be lost is its rounding, over the coefficient a formula divides by
    back = to_x0(truth, x_t, alpha, sigma, kind)
    assert ((back - x0).abs() <= rounding * size * (1 / a if kind == "eps" else 1)).all()
    forth = from_x0(x0, x_t, alpha, sigma, kind)
    assert ((forth - truth).abs() <= rounding * size * (1 + (a + s) / s)).all()


def test_velocity_is_the_derivative_of_the_flow_path() -> None:
    schedule = FlowSchedule()
    x0, noise = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    t = torch.rand(4, dtype=torch.float64) * 0.9 + 0.05
    derivative = (add_noise(schedule, x0, noise, t + 1e-5) - add_noise(schedule, x0, noise, t - 1e-5)) / 2e-5
    velocity = from_x0(x0, add_noise(schedule, x0, noise, t), schedule.alpha(t), schedule.sigma(t), "flow")
    torch.testing.assert_close(velocity, derivative, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", VP_CONFIGS)
def test_discrete_schedule_is_diffusers_own_at_the_timesteps(name: str) -> None:
    schedule = vp_schedule_from_config(VP_CONFIGS[name])
    table = DDPMScheduler(**VP_CONFIGS[name]).alphas_cumprod
    t = torch.arange(len(table), dtype=torch.float32)
    torch.testing.assert_close(schedule.alpha(t), table.sqrt(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(schedule.sigma(t), (1 - table.double()).sqrt().float(), rtol=1e-6, atol=1e-7)


def test_diffusers_noises_and_inverts_v_predictions_the_same_way() -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    schedule = vp_schedule_from_config(scheduler.config)
    x0, noise, t = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 10, 500, 998, 999])
    x_t = add_noise(schedule, x0, noise, t.float())
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t), rtol=1e-5, atol=1e-6)
    velocity = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(
        from_x0(x0, x_t, schedule.alpha(t.float()), schedule.sigma(t.float()), "v"), velocity, rtol=1e-3, atol=1e-3
    )


def test_variance_is_preserved_between_timesteps_and_zero_terminal_snr_is_exact() -> None:
    schedule = SCHEDULES["zero-terminal-snr"]
    t = torch.linspace(schedule.t_min, schedule.t_max, 4001)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-6)
    assert (alpha.diff() < 0).all()
    assert schedule.alpha(torch.tensor([schedule.t_max])).item() == 0.0
    assert torch.isinf(noise_to_signal(schedule, torch.tensor([schedule.t_max]))).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_level_inverts_the_noise_to_signal_ratio(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.linspace(schedule.t_min, schedule.t_max, 57, dtype=torch.float64)
    torch.testing.assert_close(schedule.level(noise_to_signal(schedule, t)), t, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_level_samplers_stay_in_range_and_follow_the_uniform_draw(name: str) -> None:
    schedule = SCHEDULES[name]
    u = torch.linspace(0, 1, 101)
    for t in (uniform_levels(schedule, u), karras_levels(schedule, u), lognormal_levels(schedule, u)):
        assert (t >= schedule.t_min).all()
        assert (t <= schedule.t_max).all()
        assert (t.diff() >= 0).all()
    assert uniform_levels(schedule, u)[-1] == schedule.t_max


def test_karras_levels_are_the_published_grid() -> None:
    u = torch.linspace(0, 1, 1000, dtype=torch.float64)
    i = torch.arange(1000, dtype=torch.float64)
    grid = (80 ** (1 / 7) + i / 999 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(karras_levels(EDMSchedule(), u), grid.flip(0), rtol=1e-6, atol=1e-9)


def test_lognormal_levels_have_the_asked_moments() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log_sigma = lognormal_levels(EDMSchedule(1e-9, 1e9), u, mean=-1.2, std=1.2).log()
    assert abs(log_sigma.mean().item() + 1.2) < 1e-3
    assert abs(log_sigma.std().item() - 1.2) < 1e-3


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ArgumentError, match="sigma_min"):
        EDMSchedule(1.0, 0.5)
    with pytest.raises(ArgumentError, match="decrease"):
        VPSchedule(torch.tensor([0.5, 0.6]))
    with pytest.raises(CheckpointError, match="did you mean 'scaled_linear'"):
        vp_schedule_from_config({"beta_schedule": "scaled_liner"})
    with pytest.raises(ArgumentError, match="did you mean 'eps'"):
        to_x0(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1), "epsi")  # type: ignore[arg-type]

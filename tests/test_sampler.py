from __future__ import annotations

import pytest
import torch

from fdistill.noise import EDMSchedule, FlowSchedule, NoiseSchedule, noise_to_signal, vp_schedule_from_config
from fdistill.sampler import evaluations, heun_sample, heun_states, sampling_levels
from support.denoisers import GaussianDenoiser

SCHEDULES: dict[str, NoiseSchedule] = {
    "edm": EDMSchedule(),
    "flow": FlowSchedule(),
    "vp": vp_schedule_from_config({"beta_schedule": "linear"}),
    "zero-terminal-snr": vp_schedule_from_config({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_of_a_gaussian_are_that_gaussian(name: str) -> None:
    """The probability-flow ODE of Gaussian data is linear: x0 = mean + std * noise where the schedule ends in pure
    noise."""
    torch.manual_seed(0)
    schedule = SCHEDULES[name]
    denoiser = GaussianDenoiser(0.4, 0.6, schedule, size=2)
    noise = torch.randn(20_000, 1, 1, 2)
    samples = heun_sample(denoiser, noise, num_steps=40)
    # Off by what is left of the mean at t_max, and by the discretisation.
    assert abs(samples.mean().item() - 0.4) < 0.02
    assert abs(samples.std().item() - 0.6) < 0.02
    correlation = torch.corrcoef(torch.stack([samples.flatten(), noise.flatten()]))[0, 1]
    assert correlation > 0.9999


@pytest.mark.parametrize("name", SCHEDULES)
def test_states_on_the_way_are_those_of_the_ode(name: str) -> None:
    """Of Gaussian data, x_t = alpha mean + sqrt(alpha^2 std^2 + sigma^2) noise where the start is pure noise; and with
    the stops that the grid has anyway, nothing changes.
    """
    torch.manual_seed(0)
    schedule = SCHEDULES[name]
    denoiser = GaussianDenoiser(0.4, 0.6, schedule, size=2).double()
    noise = torch.randn(200, 1, 1, 2, dtype=torch.float64)
    stops = [
        schedule.t_max,
        *(schedule.t_min + share * (schedule.t_max - schedule.t_min) for share in (0.6, 0.1, 0.02)),
    ]
    x0, states = heun_states(denoiser, noise, None, 60, stops)
    assert states.shape == (200, 3, 1, 1, 2)
    for level, state in zip(stops[1:], states.unbind(1), strict=True):
        t = torch.tensor(level, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        wanted = alpha * 0.4 + (alpha**2 * 0.6**2 + sigma**2).sqrt() * noise
        assert (state - wanted).abs().mean() < 0.02 * wanted.std()
    torch.testing.assert_close(x0, heun_sample(denoiser, noise, None, 60), rtol=1e-2, atol=1e-2)
    grid = sampling_levels(denoiser, 9)
    own, on_grid = heun_states(denoiser, noise, None, 9, [schedule.t_max, *grid[[3, 6]].tolist()])
    assert torch.equal(own, heun_sample(denoiser, noise, None, 9))
    assert on_grid.shape[1] == 2


def test_heun_is_second_order() -> None:
    denoiser = GaussianDenoiser(0.4, 0.6, EDMSchedule(0.02, 20.0), size=2).double()
    noise = torch.randn(64, 1, 1, 2, dtype=torch.float64)
    exact = heun_sample(denoiser, noise, num_steps=2000)
    errors = [(heun_sample(denoiser, noise, num_steps=n) - exact).abs().max().item() for n in (20, 40)]
    assert 3.2 < errors[0] / errors[1] < 5.0


def test_levels_are_the_karras_grid_and_cost_two_evaluations_each_but_one() -> None:
    levels = sampling_levels(GaussianDenoiser(0, 1), 18)
    i = torch.arange(18)
    torch.testing.assert_close(
        levels, (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rtol=1e-5, atol=1e-7
    )
    assert evaluations(18) == 35


def test_levels_start_at_t_max_where_the_ratio_is_infinite() -> None:
    schedule = SCHEDULES["zero-terminal-snr"]
    levels = sampling_levels(GaussianDenoiser(0, 1, schedule), 10)
    assert levels[0] == schedule.t_max
    assert torch.isinf(noise_to_signal(schedule, levels[:1])).all()
    assert (levels.diff() < 0).all()


def test_evaluations_are_counted_right() -> None:
    class Counting(GaussianDenoiser):
        calls = 0

        def run(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            type(self).calls += 1
            return super().run(*args, **kwargs)

    heun_sample(Counting(0, 1), torch.randn(2, 1, 1, 1), num_steps=18)
    assert Counting.calls == 35

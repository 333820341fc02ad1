from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fdistill import DensityRatio
from fdistill.base.errors import ArgumentError
from fdistill.divergence import DIVERGENCES


def closed_form(
    logits: np.ndarray,
    sigma: np.ndarray,
    name: str,
    bins: np.ndarray,
    *,
    edges: str,
    momentum: float,
    span: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """The published order of operations in float64 numpy, one sample at a time."""
    low, high = span
    ratio = np.clip(np.exp(np.clip(logits.reshape(len(logits), -1).mean(1), -10, 10)), 0.1, 20)
    position = (
        (np.log(sigma) - math.log(low)) / (math.log(high) - math.log(low))
        if edges == "log-sigma"
        else (sigma - low) / (high - low)
    )
    index = [min(len(bins) - 1, max(0, math.floor(p * len(bins)))) for p in position]
    new = bins.copy()
    for k in set(index):
        mean = np.mean([r for r, i in zip(ratio, index, strict=True) if i == k])
        new[k] = momentum * bins[k] + (1 - momentum) * mean
    h = DIVERGENCES[name].weight(torch.tensor([r / new[i] for r, i in zip(ratio, index, strict=True)])).numpy()
    return h / h.mean(), new


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("edges", ["log-sigma", "linear"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("heads", [None, 3])
def test_weight_is_the_published_formula(name: str, edges: str, momentum: float, heads: int | None) -> None:
    random = np.random.default_rng(0)
    ratio = DensityRatio(bin_edges=edges, momentum=momentum)  # type: ignore[arg-type]
    bins = np.ones(10)
    for _ in range(3):
        logits = random.normal(0, 4, (64,) if heads is None else (64, heads)).astype(np.float32)
        sigma = np.exp(random.uniform(math.log(0.001), math.log(120), 64)).astype(np.float32)  # some beyond either end
        expected, bins = closed_form(
            logits.astype(float), sigma.astype(float), name, bins, edges=edges, momentum=momentum, span=(0.002, 80.0)
        )
        weight = ratio.weight(torch.from_numpy(logits), torch.from_numpy(sigma), name)
        assert weight.dtype == torch.float32
        np.testing.assert_allclose(weight.numpy(), expected, rtol=2e-6)
        np.testing.assert_allclose(ratio.bins.numpy(), bins, rtol=2e-6)
        assert abs(weight.mean().item() - 1) < 1e-6


def test_empty_bins_keep_their_value_and_start_at_one() -> None:
    ratio = DensityRatio(num_bins=4, sigma_min=1.0, sigma_max=16.0)
    ratio.weight(torch.tensor([math.log(3.0)] * 2), torch.tensor([1.5, 1.5]), "kl")
    torch.testing.assert_close(ratio.bins, torch.tensor([3.0, 1.0, 1.0, 1.0]))
    ratio.weight(torch.tensor([math.log(5.0)] * 2), torch.tensor([9.0, 9.0]), "kl")
    torch.testing.assert_close(ratio.bins, torch.tensor([3.0, 1.0, 1.0, 5.0]))


def test_bins_are_stated_in_log_sigma_and_take_infinity() -> None:
    ratio = DensityRatio(num_bins=4, sigma_min=1.0, sigma_max=16.0)
    sigma = torch.tensor([0.5, 1.0, 1.99, 2.01, 4.01, 15.9, 16.0, 99.0, math.inf])
    assert ratio.bin_index(sigma).tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3]


def test_reverse_kl_weighs_every_sample_alike() -> None:
    weight = DensityRatio().weight(torch.randn(32) * 5, torch.rand(32) + 0.1, "reverse-kl")
    assert weight.shape == (32,)
    assert (weight == 1).all()


def test_extreme_logits_are_clamped_and_counted() -> None:
    logits = torch.tensor([1e30, -1e30, math.inf, -math.inf, 0.0], requires_grad=True)
    result = DensityRatio(num_bins=1).evaluate(logits, torch.ones(5), "forward-kl")
    assert torch.isfinite(result.weight).all()
    assert not result.weight.requires_grad
    assert result.clamped.tolist() == [1, 1, 1, 1, 0]
    torch.testing.assert_close(result.h[0] / result.h[1], torch.tensor(20 / 0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower": 0.0}, "lower"),
        ({"lower": 2.0}, "lower"),
        ({"upper": 0.5}, "upper"),
        ({"num_bins": 0}, "num_bins"),
        ({"momentum": 1.0}, "momentum"),
        ({"bin_edges": "log"}, "bin_edges"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_max": math.inf}, "sigma_max"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DensityRatio(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"upper": 30000.0}, r"upper.*22026"), ({"upper": 22027.0}, r"upper.*22026"), ({"lower": 4e-5}, "lower")],
)
def test_bounds_that_clamped_logits_never_reach_are_refused(settings: dict[str, float], message: str) -> None:
    """Logits are clamped to +-10, so ratios to e^-10 = 4.54e-5 and e^10 = 22026.47."""
    with pytest.raises(ArgumentError, match=message):
        DensityRatio(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_widest_bounds_are_reached(backend: str) -> None:
    ratio = DensityRatio(lower=5e-5, upper=22026.0, num_bins=1)
    result = ratio.evaluate(torch.tensor([20.0, 0.0, -20.0]), torch.ones(3), "forward-kl", backend=backend)
    torch.testing.assert_close(result.h / result.h[1], torch.tensor([22026.0, 1.0, 5e-5]), rtol=1e-6, atol=0)
    assert result.clamped.tolist() == [1, 0, 1]


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"\(4, 1, 1\)"):
        DensityRatio().weight(torch.zeros(4, 1, 1), torch.ones(4), "js")
    with pytest.raises(ArgumentError, match="sigma"):
        DensityRatio().weight(torch.zeros(4), torch.ones(3), "js")


@pytest.mark.parametrize("name", ["alpha(-30)", "alpha(60)", "alpha(100)"])
def test_weights_that_no_float32_holds_are_normalised_first(name: str) -> None:
    logits = torch.linspace(-3, 3, 64)
    result = DensityRatio(num_bins=1).evaluate(logits, torch.full((64,), 0.5), name)
    assert torch.isfinite(result.weight).all()
    assert torch.isfinite(result.h).all()
    assert result.weight.mean().item() == pytest.approx(1, rel=1e-5)

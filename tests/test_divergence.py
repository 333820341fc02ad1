from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily, Normal

from fdistill.base.errors import ArgumentError
from fdistill.divergence import ALIASES, DIVERGENCES, Divergence, alpha_divergence, divergence_from, get_divergence

ALPHAS = [-1.5, -1e-7, 0.0, 1e-7, 0.3, 0.5, 1 - 1e-7, 1.0, 1 + 1e-7, 2.0, 3.0]
ALL = [*DIVERGENCES, *(f"alpha({a})" for a in ALPHAS)]


def ratios() -> Tensor:
    return torch.logspace(-3, 3, 61, dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_weight_is_r_squared_times_the_second_derivative_of_f(name: str) -> None:
    divergence = get_divergence(name)
    r = ratios().requires_grad_(True)
    (first,) = torch.autograd.grad(divergence.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    # Where f'' is the difference of terms of size |f'| / r, float64 leaves about 1e-16 of those.
    tolerance = 1e-10 * divergence.weight(r) + 1e-14 * r * (first.abs() + 1)
    assert ((divergence.weight(r) - r**2 * second).abs() <= tolerance).all()


@pytest.mark.parametrize("name", ALL)
def test_f_is_convex_and_zero_at_one(name: str) -> None:
    """Below its chords, and above its tangent at 1; a ratio far from 1 costs something."""
    f = get_divergence(name).f
    assert abs(f(torch.ones(1, dtype=torch.float64)).item()) < 1e-15
    low, high = torch.cartesian_prod(ratios(), ratios()).unbind(1)
    apart = high > 1.05 * low
    low, high = low[apart], high[apart]
    for share in (0.1, 0.5, 0.9):
        chord = share * f(low) + (1 - share) * f(high)
        assert (f(share * low + (1 - share) * high) < chord).all()
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(one), one)
    away = torch.tensor([0.01, 0.5, 2.0, 100.0], dtype=torch.float64)
    assert (f(away) - slope * (away - 1) > 1e-3).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weights_in_float32_keep_shape_and_six_digits(name: str) -> None:
    divergence = get_divergence(name)
    r = ratios().reshape(-1, 1)
    weight = divergence.weight(r.float())
    assert weight.shape == r.shape
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), divergence.weight(r.float().double()), rtol=1e-6, atol=0)


def test_published_weights() -> None:
    r = ratios()
    published = {
        "rkl": torch.ones_like(r),
        "sf": 1 / (r + 1),
        "js": r / (r + 1),
        "sh": r.sqrt() / 4,
        "kl": r,
        "jf": r + 1,
        "neyman": 2 / r,
        "pearson": 2 * r**2,
    }
    assert published.keys() == ALIASES.keys()
    for alias, expected in published.items():
        torch.testing.assert_close(get_divergence(alias).weight(r), expected)


def test_alpha_family_is_continuous_at_its_limits_and_meets_its_relatives() -> None:
    r = ratios()
    # Its values at a limit, and close to it from either side.
    for limit in (0.0, 1.0):
        for a in (limit - 1e-9, limit + 1e-9):
            torch.testing.assert_close(alpha_divergence(a).f(r), alpha_divergence(limit).f(r), rtol=1e-7, atol=1e-12)
    # f differs by a linear term in (r - 1), which no divergence sees.
    torch.testing.assert_close(alpha_divergence(0).f(r), -torch.log(r) + (r - 1))
    torch.testing.assert_close(alpha_divergence(1).f(r), r * torch.log(r) - (r - 1))
    torch.testing.assert_close(alpha_divergence(2).f(r), (r - 1) ** 2 / 2, rtol=1e-9, atol=1e-12)
    # The two branches of the formula agree where they meet.
    torch.testing.assert_close(alpha_divergence(0.5).f(r), alpha_divergence(0.5 - 1e-12).f(r), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha(0.5)", "alpha(-1)", "alpha(1.5)"])
def test_gradient_identity_by_quadrature(name: str) -> None:
    """d/dtheta D_f(p || q_theta) = -E_q[h(r) (s_p - s_q) dx/dtheta] for a mixture teacher and a Gaussian student."""
    divergence = get_divergence(name)
    x = torch.linspace(-30, 30, 400_001, dtype=torch.float64)
    step = (x[1] - x[0]).item()
    noise = 0.8
    means = torch.tensor([-1.0, 1.5], dtype=torch.float64)
    stds = torch.tensor([0.5, 0.7], dtype=torch.float64)
    mixture = MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)),
        Normal(means, (stds**2 + noise**2).sqrt()),
    )
    a = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def log_q(points: Tensor) -> Tensor:
        return Normal(b, (a**2 + noise**2).sqrt()).log_prob(points)

    r = (mixture.log_prob(x) - log_q(x)).exp()
    # Out where both densities vanish chi-squares still want 0, not inf * 0.
    inside = (mixture.log_prob(x) > -500) & (log_q(x) > -500)
    value = (log_q(x).exp() * divergence.f(r))[inside].sum() * step
    true_a, true_b = torch.autograd.grad(value, (a, b))

    points = x.clone().requires_grad_(True)
    (score_p,) = torch.autograd.grad(mixture.log_prob(points).sum(), points)
    (score_q,) = torch.autograd.grad(log_q(points).sum(), points)
    with torch.no_grad():
        integrand = -(log_q(x).exp() * divergence.weight(r) * (score_p - score_q))[inside]
        # dx_t/db = 1, and dx_t/da = z, whose mean given x_t is a (x_t - b) / (a^2 + noise^2).
        z = (a * (x - b) / (a**2 + noise**2))[inside]
        estimate_b, estimate_a = integrand.sum() * step, (integrand * z).sum() * step
    torch.testing.assert_close(estimate_b, true_b, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(estimate_a, true_a, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jenson-shannon", "did you mean 'jensen-shannon'"),
        ("kll", "did you mean 'kl'"),
        ("alpha(x)", "finite number"),
        ("alpha(inf)", "finite number"),
        ("alpha(nan)", "finite number"),
    ],
)
def test_unknown_divergences_are_refused(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        get_divergence(name)


def test_a_divergence_of_ones_own_needs_no_registry() -> None:
    own = Divergence("half-chi2", lambda r: (r - 1) ** 2 / 2, lambda r: r**2)
    assert own.weight(torch.tensor([2.0])).item() == 4.0
    assert math.isclose(own.f(torch.tensor([3.0])).item(), 2.0)


@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha(0.5)", "alpha(-1)"])
def test_a_weight_from_f_alone_is_the_closed_form(name: str) -> None:
    known = get_divergence(name)
    own = divergence_from(known.f, name)
    r = torch.logspace(-2, 2, 41)
    torch.testing.assert_close(own.weight(r), known.weight(r), rtol=1e-5, atol=0)
    assert own.weight(r).dtype == torch.float32
    torch.testing.assert_close(own.weight_slope(r), known.weight_slope(r), rtol=1e-4, atol=1e-5)
    assert own.needs_ratio == known.needs_ratio == (name != "reverse-kl")
    assert divergence_from(known.f, name) is own


def test_the_slope_of_a_weight_is_differentiable() -> None:
    r = torch.linspace(0.2, 3, 7, dtype=torch.float64, requires_grad=True)
    slope = get_divergence("js").weight_slope(r)  # r / (1 + r)^2
    torch.testing.assert_close(slope, r / (1 + r) ** 2)
    (second,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(second, (1 - r) / (1 + r) ** 3)
    with torch.no_grad():
        torch.testing.assert_close(get_divergence("js").weight_slope(r), r / (1 + r) ** 2)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda r: -torch.log(r) + 0.5, r"expected f\(1\) = 0, got f\(1\) = 0.5"),
        (lambda r: torch.log(r), r"must be convex.*at r = 0.0001 it is"),
        (lambda r: (r - 1) ** 3, r"must be convex.*at r = 0.0001 it is -5.999"),
        (lambda r: (r - 1) ** 2 - 3 * (r - 2).clamp(min=0), r"slope must not fall; at r = 1\.9"),
        (lambda r: r - 1, "f'' = 0 at every ratio"),
        (lambda r: 1 / (r - 1), "must be finite.*at r = 1 it is inf"),
        (lambda r: torch.sqrt(r - 0.5) - 0.5**0.5, "must be finite.*at r = 0.0001 it is nan"),
        (lambda r: (r - 1).square().sum(), "must be elementwise; .* gave \\(\\)"),
        (lambda r: 0.0, "must be elementwise; .* gave float"),
        (lambda r: r @ r, "must be elementwise"),
        (lambda: 1, "raised TypeError"),
    ],
)
def test_functions_that_are_no_divergence_are_refused_with_the_point(f: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        divergence_from(f, "own")


def test_functions_that_cannot_be_imported_are_refused() -> None:
    for name in ("no_such_module:f", "math:nothing"):
        with pytest.raises(ArgumentError, match="expected module:function that Python can import"):
            get_divergence(name)
    with pytest.raises(ArgumentError, match="raised ValueError"):
        get_divergence("math:sqrt")


def test_functions_and_callables_are_divergences_themselves() -> None:
    @dataclass
    class Scaled:  # no hash
        scale: float

        def __call__(self, r: Tensor) -> Tensor:
            return self.scale * (r - 1) ** 2

    r = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(get_divergence(Scaled(0.5)).weight(r), r**2)
    assert get_divergence(lambda r: (r - 1) ** 2).name == "<lambda>"
    js = get_divergence("js")
    assert get_divergence(js) is js

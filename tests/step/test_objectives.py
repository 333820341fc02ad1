"""Gradients of the objectives against derivatives of the divergences they descend, by quadrature in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fdistill.divergence import DIVERGENCES, get_divergence
from fdistill.losses import (
    implicit_means,
    matching_loss,
    score_difference_loss,
    score_difference_weight,
    sid_loss,
    sim_loss,
    uni_instruct_loss,
)
from support.testbed import Case, case

CASES = ["affine", "mlp", "affine-2d"]
EXPANDED = ["forward-kl", "reverse-kl", "jeffreys", "jensen-shannon", "pearson-chi2"]


def assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    """Relative error of the whole parameter gradient."""
    a, b = (torch.cat([value.flatten() for value in values]) for values in (got, wanted))
    assert b.norm() > 1e-3
    assert (a - b).norm() <= tolerance * b.norm(), f"relative error {((a - b).norm() / b.norm()).item():.2e}"


def score_difference(x: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    (u,) = torch.autograd.grad((log_p - log_q).sum(), x, create_graph=True)
    return u


def fisher(weight: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """q h(r) |s_p - s_q|^2."""

    def integrand(x: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        u = score_difference(x, log_p, log_q)
        return log_q.exp() * weight((log_p - log_q).clamp(-300, 300).exp()) * u.square().sum(1)

    return integrand


def fixed_sampling(distance: Callable[[Tensor], Tensor], at: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """sg[q] d(difference of x0-predictions): what score implicit matching descends."""

    def integrand(x: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.detach().exp() * distance(at.sigma**2 / at.alpha * score_difference(x, log_p, log_q))

    return integrand


@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha(0.5)", "alpha(-1)", "alpha(1.5)"])
@pytest.mark.parametrize("where", CASES)
def test_weighted_score_difference_is_the_gradient_of_the_divergence(where: str, name: str) -> None:
    """f-distill: E[h(r) (s_q - s_p) . dx_t], through both matching losses; DMD, DMD2, Diff-Instruct and VSD are its
    reverse KL."""
    at, divergence = case(where), get_divergence(name)

    def f_divergence(x: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * divergence.f((log_p - log_q).clamp(-300, 300).exp())

    wanted = at.gradient_of_integral(f_divergence)
    scale = (at.alpha / at.sigma) ** 2 * len(at.x[0])  # the losses divide by the number of pixels

    def plain(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, r: Tensor) -> Tensor:
        return score_difference_loss(x0, teacher_x0, fake_x0, scale * divergence.weight(r))

    def normalised(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, r: Tensor) -> Tensor:
        undo = (x0 - teacher_x0).abs().mean(1).detach()
        return matching_loss(x0, teacher_x0, fake_x0, weight=(scale * divergence.weight(r) * undo).detach())

    for loss in (plain, normalised):
        assert_same(at.gradient_of_loss(loss, through_x_t=False), wanted)


@pytest.mark.parametrize("where", CASES)
def test_sid_with_half_is_the_fisher_divergence(where: str) -> None:
    at = case(where)
    scale = 2 * at.alpha**2 / at.sigma**4 * len(at.x[0])

    def loss(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, r: Tensor) -> Tensor:
        return scale * sid_loss(implicit_means(x0, teacher_x0, fake_x0), alpha=0.5)

    assert_same(at.gradient_of_loss(loss, through_x_t=True), at.gradient_of_integral(fisher(torch.ones_like)))


@pytest.mark.parametrize("where", CASES)
@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_sid_adds_the_square_in_proportion(where: str, alpha: float) -> None:
    """SiD(alpha) = SiD(1/2) + (1/2 - alpha) E_path|T - F|^2, the last by differentiating through x_t."""
    at = case(where)

    def square(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, r: Tensor) -> Tensor:
        return (0.5 - alpha) * (teacher_x0 - fake_x0).square().mean(1)

    got = at.gradient_of_loss(lambda x0, t, f, r: sid_loss(implicit_means(x0, t, f), alpha=alpha), through_x_t=True)
    half = at.gradient_of_integral(fisher(torch.ones_like))
    scale = at.sigma**4 / (2 * at.alpha**2 * len(at.x[0]))
    rest = at.gradient_of_loss(square, through_x_t=True)
    assert_same(got, [scale * a + b for a, b in zip(half, rest, strict=True)])


@pytest.mark.parametrize("where", CASES)
def test_sim_descends_its_distance_at_fixed_sampling(where: str) -> None:
    at, c = case(where), 0.3

    def huber(difference: Tensor) -> Tensor:
        return (difference.square().mean(1) + c**2).sqrt() - c

    got = at.gradient_of_loss(lambda x0, t, f, r: sim_loss(implicit_means(x0, t, f), huber_c=c), through_x_t=True)
    assert_same(got, at.gradient_of_integral(fixed_sampling(huber, at)))
    squared = at.gradient_of_loss(lambda x0, t, f, r: sid_loss(implicit_means(x0, t, f), alpha=1.0), through_x_t=True)
    half_square = fixed_sampling(lambda difference: difference.square().mean(1) / 2, at)
    assert_same(squared, at.gradient_of_integral(half_square))


@pytest.mark.parametrize("where", CASES)
@pytest.mark.parametrize("name", [*EXPANDED, "softened-reverse-kl", "alpha(0.5)"])
def test_uni_instruct_is_the_gradient_of_the_weighted_fisher_divergence(where: str, name: str) -> None:
    at, divergence = case(where), get_divergence(name)
    scale = 2 * at.alpha**2 / at.sigma**4 * len(at.x[0])

    def loss(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, r: Tensor) -> Tensor:
        return scale * uni_instruct_loss(
            implicit_means(x0, teacher_x0, fake_x0), divergence.weight(r), divergence.weight_slope(r)
        )

    assert_same(at.gradient_of_loss(loss, through_x_t=True), at.gradient_of_integral(fisher(divergence.weight)))


def uni_instruct_error(name: str, changed: Callable[[Tensor], Tensor]) -> float:
    """Relative error of Uni-Instruct's gradient when the loss reads changed(r) in place of r."""
    at, divergence = case("affine"), get_divergence(name)
    scale = 2 * at.alpha**2 / at.sigma**4

    def loss(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, r: Tensor) -> Tensor:
        h, slope = divergence.weight(changed(r)), divergence.weight_slope(changed(r))
        return scale * uni_instruct_loss(implicit_means(x0, teacher_x0, fake_x0), h, slope)

    got, wanted = at.gradient_of_loss(loss, through_x_t=True), at.gradient_of_integral(fisher(divergence.weight))
    a, b = (torch.cat([value.flatten() for value in values]) for values in (got, wanted))
    return ((a - b).norm() / b.norm()).item()


def test_a_detached_weight_is_biased() -> None:
    """The variant that `objective.detach_weight` offers: right for reverse KL, wrong for the others."""
    assert uni_instruct_error("reverse-kl", torch.detach) < 1e-6
    documented = {"forward-kl": 0.34, "jeffreys": 0.21, "jensen-shannon": 0.15, "pearson-chi2": 0.67}
    for name, error in documented.items():
        assert uni_instruct_error(name, torch.detach) == pytest.approx(error, abs=0.005), name


def test_a_clamped_ratio_is_biased() -> None:
    """No gradient passes where the ratio is clamped; bounds that clamp nothing cost nothing."""
    for name, error in {"forward-kl": 0.26, "jensen-shannon": 0.04}.items():
        assert uni_instruct_error(name, lambda r: r.clamp(0.5, 1.5)) == pytest.approx(error, abs=0.005), name
        assert uni_instruct_error(name, lambda r: r.clamp(0.1, 20.0)) < 1e-6


@pytest.mark.parametrize("name", EXPANDED)
def test_table_of_the_second_term(name: str) -> None:
    """h - r h' against the closed forms, as derived for the five divergences of Uni-Instruct."""
    r = torch.logspace(-2, 2, 41, dtype=torch.float64)
    wanted = {
        "forward-kl": torch.zeros_like(r),
        "reverse-kl": torch.ones_like(r),
        "jeffreys": torch.ones_like(r),
        "jensen-shannon": (r / (1 + r)) ** 2,
        "pearson-chi2": -2 * r**2,
    }[name]
    divergence = get_divergence(name)
    torch.testing.assert_close(divergence.weight(r) - divergence.weight_slope(r), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_fall_with_noise_at_the_rate_of_the_weighted_fisher_divergence(name: str) -> None:
    """What Uni-Instruct expands: d/d(sigma^2) D_f(p_t || q_t) = -1/2 E_q[h(r) |s_p - s_q|^2]."""
    divergence, base = get_divergence(name), case("affine")

    def integral(integrand: Callable[[Tensor, Tensor, Tensor], Tensor], variance: float) -> Tensor:
        at = Case(**{**vars(base), "sigma": variance**0.5})
        x = at.x.clone().requires_grad_(True)
        log_p, log_q = at.log_p(x), at.log_q(x, frozen=True)
        inside = (log_p > -300) & (log_q > -300)
        return torch.where(inside, integrand(x, log_p, log_q), torch.zeros_like(log_p)).sum() * at.cell

    def f_divergence(x: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * divergence.f((log_p - log_q).clamp(-300, 300).exp())

    variance, step = 0.64, 1e-3
    differences = [integral(f_divergence, variance + k * step) for k in (-2, -1, 1, 2)]
    slope = (differences[0] - 8 * differences[1] + 8 * differences[2] - differences[3]) / (12 * step)
    rate = -integral(fisher(divergence.weight), variance) / 2
    torch.testing.assert_close(slope, rate, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("method", ["f-distill js", "diff-instruct", "vsd", "sim", "sid", "uni-instruct kl"])
def test_monte_carlo_agrees_within_three_standard_errors(method: str) -> None:
    """The same losses on random draws: their mean gradient against the derivative."""
    at = case("affine")
    alpha, sigma = torch.tensor([at.alpha], dtype=torch.float64), torch.tensor([at.sigma], dtype=torch.float64)
    fisher_scale = 2 * at.alpha**2 / at.sigma**4
    name, _, suffix = method.partition(" ")
    divergence = get_divergence(suffix or "rkl")
    kl_scale = (at.alpha / at.sigma) ** 2

    def f_divergence(x: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * divergence.f((log_p - log_q).clamp(-300, 300).exp())

    def huber(difference: Tensor) -> Tensor:
        return (difference.square().mean(1) + 0.09).sqrt()

    losses: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "f-distill": lambda x0, t, f, r: score_difference_loss(x0, t, f, kl_scale * divergence.weight(r)),
        "diff-instruct": lambda x0, t, f, r: (
            kl_scale * score_difference_loss(x0, t, f, score_difference_weight("uniform", alpha, sigma).expand(len(x0)))
        ),
        "vsd": lambda x0, t, f, r: (
            kl_scale
            / score_difference_weight("vsd", alpha, sigma)
            * score_difference_loss(x0, t, f, score_difference_weight("vsd", alpha, sigma).expand(len(x0)))
        ),
        "sim": lambda x0, t, f, r: sim_loss(implicit_means(x0, t, f), huber_c=0.3),
        "sid": lambda x0, t, f, r: fisher_scale * sid_loss(implicit_means(x0, t, f), alpha=0.5),
        "uni-instruct": lambda x0, t, f, r: (
            fisher_scale * uni_instruct_loss(implicit_means(x0, t, f), divergence.weight(r), divergence.weight_slope(r))
        ),
    }
    integrals = {
        "sim": fixed_sampling(huber, at),
        "sid": fisher(torch.ones_like),
        "uni-instruct": fisher(divergence.weight),
    }
    wanted_a, wanted_b = at.gradient_of_integral(integrals.get(name, f_divergence))

    draws = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(200_000, 1, generator=draws, dtype=torch.float64) for _ in range(2))
    x0 = at.student(z).detach().requires_grad_(True)
    x_t = at.alpha * x0 + at.sigma * eps
    if name in ("f-distill", "diff-instruct", "vsd"):
        x_t = x_t.detach().requires_grad_(True)
    (per_sample,) = torch.autograd.grad(losses[name](x0, *at.evaluated(x_t)).sum(), x0)
    # x0 = a z + b, so each sample's gradient in b is that in x0, and in a that times z.
    for gradient, wanted in ((per_sample * z, wanted_a), (per_sample, wanted_b)):
        error = gradient.std() / len(z) ** 0.5
        assert abs(gradient.mean() - wanted.squeeze()) < 3 * error
        assert error < 0.1 * abs(wanted.squeeze())  # or the comparison would say nothing


def test_the_implicit_inner_product_vanishes_without_its_gradient() -> None:
    """SiD's identity E[g(x_t) . (F(x_t) - x0)] = 0: the value carries nothing, the gradient all."""
    at = case("mlp")
    x0 = at.student(at.z).detach().repeat_interleave(len(at.eps), 0)
    weights = (at.z_weights[:, None] * at.eps_weights).flatten()
    x_t = (at.alpha * x0 + at.sigma * at.eps.repeat(len(at.z), 1)).requires_grad_(True)
    teacher_x0, fake_x0, r = at.evaluated(x_t)
    value = r * implicit_means(x0, teacher_x0, fake_x0).inner
    assert abs((weights * value).sum().item()) < 1e-12
    assert (weights * value.abs()).sum() > 0.1


@pytest.mark.parametrize("where", CASES)
def test_the_slope_of_the_exact_log_ratio_is_the_gradient_of_reverse_kl(where: str) -> None:
    """DiffRatio: the push sigma^2 / alpha d log r / d x_t, in place of a difference of predictions."""
    at = case(where)

    def reverse_kl(x: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * (log_q - log_p)

    rows, columns = len(at.z), len(at.eps)
    weights = (at.z_weights[:, None] * at.eps_weights).flatten()
    kept = weights > 1e-13 * weights.max()
    x0 = at.student(at.z.repeat_interleave(columns, 0)[kept])
    x_t = (at.alpha * x0 + at.sigma * at.eps.repeat(rows, 1)[kept]).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad((at.log_p(x_t) - at.log_q(x_t, frozen=True)).sum(), x_t)
    level = torch.full_like(x0[:, 0], at.alpha), torch.full_like(x0[:, 0], at.sigma)
    weight = at.sigma**2 / at.alpha * score_difference_weight("vsd", *level).detach()
    loss = score_difference_loss(x0, slope, torch.zeros_like(slope), weight)
    undo = (at.alpha / at.sigma) ** 2 / score_difference_weight("vsd", *level) * len(at.x[0])
    got = torch.autograd.grad((weights[kept] * undo * loss).sum(), list(at.student.parameters()))
    assert_same(got, at.gradient_of_integral(reverse_kl))

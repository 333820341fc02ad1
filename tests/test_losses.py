from __future__ import annotations

import math

import pytest
import torch

from fdistill.base.errors import ArgumentError
from fdistill.losses import (
    DENOISING_WEIGHTINGS,
    approximate_r1,
    denoising_loss,
    denoising_weight,
    gan_discriminator_loss,
    gan_generator_loss,
    matching_loss,
    r1_penalty,
    score_difference_loss,
    score_difference_weight,
)
from fdistill.noise import EDMSchedule, FlowSchedule

SHAPES = [(1, 1, 8, 8), (5, 3, 31, 33), (2, 4, 64, 64), (3, 7)]


def samples(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x0, teacher, fake = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    weight = torch.rand(shape[0], generator=generator, dtype=torch.float64) * 3
    return x0, teacher, fake, weight.to(torch.float64 if dtype == torch.float64 else torch.float32)


def expected_gradient(
    x0: torch.Tensor, teacher: torch.Tensor, fake: torch.Tensor, weight: torch.Tensor, floor: float = 0.0
) -> torch.Tensor:
    """The contract's formula, one sample at a time in float64."""
    rows = [
        w * (f - t) / max((x - t).abs().mean(), floor) / x.numel()
        for x, t, f, w in zip(x0.double(), teacher.double(), fake.double(), weight.double(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_matching_gradient_is_the_contracts(shape: tuple[int, ...], upstream: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        x0, teacher, fake, weight = samples(shape, dtype)
        x0.requires_grad_(True)
        loss = matching_loss(x0, teacher, fake, weight=weight)
        assert loss.shape == shape[:1]
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (upstream * loss.sum()).backward()
        assert x0.grad is not None
        assert x0.grad.dtype == dtype
        expected = upstream * expected_gradient(x0.detach(), teacher, fake, weight)
        error = (x0.grad.double() - expected).norm() / expected.norm()
        assert error < tolerance, (dtype, error)


def test_matching_value_is_the_pseudo_target_regression() -> None:
    x0, teacher, fake, weight = samples((6, 2, 3, 3))
    target = x0 - expected_gradient(x0, teacher, fake, weight) * x0[0].numel()
    torch.testing.assert_close(
        matching_loss(x0, teacher, fake, weight=weight), (x0 - target).square().flatten(1).mean(1) / 2
    )


def test_matching_keeps_digits_where_the_pseudo_target_would_cancel() -> None:
    x0, teacher, _, _ = samples((4, 3, 8, 8), torch.float32)
    fake = teacher + 1e-6 * torch.randn(teacher.shape)
    x0.requires_grad_(True)
    matching_loss(x0, teacher, fake).sum().backward()
    expected = expected_gradient(x0.detach(), teacher, fake, torch.ones(4))
    assert x0.grad is not None
    assert ((x0.grad.double() - expected).norm() / expected.norm()) < 1e-6


def test_matching_reaches_x0_alone() -> None:
    tensors = [value.requires_grad_(True) for value in samples((3, 2, 4, 4))]
    x0, teacher, fake, weight = tensors
    matching_loss(x0, teacher, fake, weight=weight).sum().backward()
    assert x0.grad is not None
    assert teacher.grad is None
    assert fake.grad is None
    assert weight.grad is None


def test_matching_at_no_difference_is_zero_and_finite() -> None:
    x0 = torch.randn(3, 1, 4, 4, requires_grad=True)
    loss = matching_loss(x0, x0.detach().clone(), x0.detach().clone())
    loss.sum().backward()
    assert (loss == 0).all()
    assert x0.grad is not None
    assert (x0.grad == 0).all()


def test_matching_takes_non_contiguous_and_channels_last() -> None:
    x0, teacher, fake, weight = samples((4, 3, 8, 8), torch.float32)
    plain = matching_loss(x0, teacher, fake, weight=weight)
    last = (value.to(memory_format=torch.channels_last) for value in (x0, teacher, fake))
    torch.testing.assert_close(matching_loss(*last, weight=weight), plain)
    swapped = (value.transpose(2, 3).contiguous().transpose(2, 3) for value in (x0, teacher, fake))
    torch.testing.assert_close(matching_loss(*swapped, weight=weight), plain)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher_x0": torch.zeros(3, 2)}, r"teacher_x0: expected a float tensor \(2, 3\)"),
        ({"fake_x0": torch.zeros(2, 3, dtype=torch.long)}, "fake_x0"),
        ({"weight": torch.zeros(2, 1)}, r"weight: expected a float tensor \(2,\)"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int32)}, "x0: expected a float tensor"),
        ({"x0": torch.zeros(2)}, "x0"),
        ({"backend": "cuda"}, "backend"),
        ({"backend": "triton"}, "backend"),
    ],
)
def test_matching_refuses_what_does_not_fit(
    changed: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments: dict[str, object] = {
        "x0": torch.zeros(2, 3),
        "teacher_x0": torch.zeros(2, 3),
        "fake_x0": torch.zeros(2, 3),
    }
    with pytest.raises(ArgumentError, match=message):
        matching_loss(**(arguments | changed))  # type: ignore[arg-type]


def test_denoising_weights() -> None:
    sigma = torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64)
    edm = EDMSchedule()
    alpha = edm.alpha(sigma)
    torch.testing.assert_close(
        denoising_weight("edm", alpha, sigma, sigma_data=0.7), (sigma**2 + 0.7**2) / (sigma * 0.7) ** 2
    )
    torch.testing.assert_close(denoising_weight("inverse-sigma2", alpha, sigma), 1 / sigma**2)
    torch.testing.assert_close(
        denoising_weight("min-snr", alpha, sigma, min_snr_gamma=3.0), (1 / sigma**2).clamp(max=3)
    )
    torch.testing.assert_close(denoising_weight("uniform", alpha, sigma), torch.ones(4, dtype=torch.float64))
    # Where nothing of the signal is left (flow at t = 1) every weight is finite.
    t = torch.tensor([1.0])
    flow = FlowSchedule()
    for name in DENOISING_WEIGHTINGS:
        assert torch.isfinite(denoising_weight(name, flow.alpha(t), flow.sigma(t))).all()
    with pytest.raises(ArgumentError, match="did you mean 'min-snr'"):
        denoising_weight("minsnr", alpha, sigma)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.25, 0.75), (1.0, 7.0)])
@pytest.mark.parametrize("name", ["inverse-sigma2", "v", "flow"])
def test_a_weight_makes_the_x0_error_that_of_the_prediction(name: str, alpha: float, sigma: float) -> None:
    """At one x_t = alpha x0 + sigma eps, an x0 determines eps, v = alpha eps - sigma x0 and the velocity eps - x0."""
    x0, eps, predicted = torch.randn(3, 1, 2, 2, dtype=torch.float64).unbind(0)
    x_t = alpha * x0 + sigma * eps

    def target(x0: torch.Tensor) -> torch.Tensor:
        eps = (x_t - alpha * x0) / sigma
        return {"inverse-sigma2": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[name]

    error = (target(predicted) - target(x0)).square().mean()
    alpha_, sigma_ = (torch.tensor([value], dtype=torch.float64) for value in (alpha, sigma))
    loss = denoising_loss(predicted[None], x0[None], denoising_weight(name, alpha_, sigma_))
    torch.testing.assert_close(loss[0], error)


def test_denoising_loss_detaches_its_target() -> None:
    prediction, x0 = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    denoising_loss(prediction, x0, torch.tensor([1.0, 2.0])).sum().backward()
    assert x0.grad is None
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad, torch.tensor([[1.0], [2.0]]) * 2 * (prediction - x0).detach() / 3)


def test_gan_pair_is_the_logistic_one() -> None:
    logits = torch.tensor([[-2.0, 1.0], [0.5, 3.0]], dtype=torch.float32)
    probability = torch.sigmoid(logits.double())
    for value, expected in (
        (gan_discriminator_loss(logits, real=True), -probability.log()),
        (gan_discriminator_loss(logits, real=False), -(1 - probability).log()),
        (gan_generator_loss(logits), -probability.log()),
    ):
        torch.testing.assert_close(value.double(), expected.mean(1), rtol=1e-6, atol=1e-7)
    assert torch.isfinite(gan_generator_loss(torch.tensor([-1e4, 1e4]))).all()


def test_the_best_discriminator_is_the_log_ratio() -> None:
    """For two discrete distributions, descent on the pair of losses ends at log(p / q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=200, tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * gan_discriminator_loss(logits, real=True) + q * gan_discriminator_loss(logits, real=False)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach(), (p / q).log(), rtol=1e-3, atol=1e-3)


def test_r1_of_a_quadratic_discriminator() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([scale * x.square().sum((1, 2)), 3 * scale * x.square().sum((1, 2))], dim=1)
    penalty = r1_penalty(logits.double(), x)
    # The mean logit is 2 scale |x|^2, its gradient 4 scale x.
    torch.testing.assert_close(penalty.double(), 16 * 0.49 * x.detach().square().sum((1, 2)), rtol=1e-6, atol=1e-6)
    penalty.sum().backward()
    assert scale.grad is not None
    assert math.isclose(scale.grad.item(), 32 * 0.7 * x.detach().square().sum().item(), rel_tol=1e-6)


def test_approximate_r1_is_the_mean_square_over_heads() -> None:
    logits, moved = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.5, 4.0], [0.0, -4.0]])
    assert approximate_r1(logits, moved).tolist() == [(0.25 + 4) / 2, 9 / 2]
    assert approximate_r1(logits[:, 0], moved[:, 0]).tolist() == [0.25, 0.0]


@pytest.mark.parametrize("heads", [1, 2])
def test_approximate_r1_becomes_sigma_squared_times_the_exact_one(heads: int) -> None:
    """For little noise, on average over it; for several heads it is the mean of their own penalties. And so is its
    gradient in the discriminator's weights."""
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 16, generator=random), torch.randn(16, heads, generator=random)
    x, sigma, count = torch.randn(1, 6, generator=random), 1e-2, 40_000

    def logits(at: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.tanh(at @ weights) @ second

    weights = first.clone().requires_grad_(True)
    here = x.clone().requires_grad_(True)
    exact = torch.stack([r1_penalty(logits(here, weights)[:, head], here) for head in range(heads)]).mean()
    noise = torch.randn(count, 6, generator=random)
    found = approximate_r1(logits(x, weights).expand(count, heads), logits(x + sigma * noise, weights)).mean()
    assert found.item() / sigma**2 == pytest.approx(exact.item(), rel=0.03)
    slopes = [torch.autograd.grad(loss, weights)[0] for loss in (found / sigma**2, exact)]
    assert (slopes[0] - slopes[1]).norm() < 0.03 * slopes[1].norm()


def test_score_difference_weights() -> None:
    alpha, sigma = torch.tensor([1.0, 0.8, 0.6]), torch.tensor([2.0, 0.6, 0.8])
    assert score_difference_weight("uniform", alpha, sigma).tolist() == [1.0] * 3
    # sigma^2 (eps_p - eps_q) of a variance-preserving model: alpha sigma times the difference of x0-predictions.
    torch.testing.assert_close(score_difference_weight("vsd", alpha, sigma), torch.tensor([2 / 5, 0.48, 0.48]))
    with pytest.raises(ArgumentError, match="did you mean 'uniform'"):
        score_difference_weight("unifrom", alpha, sigma)


def test_score_difference_gradient_and_value() -> None:
    x0, teacher_x0, fake_x0, weight = samples((5, 1, 2, 3))
    x0.requires_grad_(True)
    loss = score_difference_loss(x0, teacher_x0, fake_x0, weight)
    (2.5 * loss).sum().backward()
    g = weight[:, None, None, None] * (fake_x0 - teacher_x0)
    torch.testing.assert_close(x0.grad, 2.5 * g / 6)
    torch.testing.assert_close(loss, g.square().flatten(1).mean(1) / 2)


@pytest.mark.parametrize("name", sorted({*DENOISING_WEIGHTINGS} - {"uniform"}))
def test_a_sigma_that_divides_must_not_be_zero(name: str) -> None:
    alpha, sigma = torch.ones(3), torch.tensor([1.0, 0.0, 2.0])
    with pytest.raises(ArgumentError, match="sigma: it is a divisor, so expected values above 0, got 0"):
        denoising_weight(name, alpha, sigma)
    assert (denoising_weight("uniform", alpha, sigma) == 1).all()

"""One pure function per loss: per-sample values [B], targets detached inside, reduction left to the caller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fdistill import kernels
from fdistill.errors import ArgumentError, did_you_mean


class _WithGradient(torch.autograd.Function):
    """A per-sample loss [B] of x0 whose gradient [B, numel_per_sample] is known already."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.like = (x0.shape, x0.dtype)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        shape, dtype = ctx.like
        return (gradient * upstream[0][:, None]).to(dtype).reshape(shape), None, None


def matching_loss(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Distribution matching: moves the student's x0 along weight * (teacher_x0 - fake_x0).

    d/dx0 of loss.sum() = weight * (fake_x0 - teacher_x0) / (mean|x0 - teacher_x0| + eps) / numel_per_sample. The
    difference of x0-predictions is sigma^2 / alpha times that of the scores; the normaliser is DMD's (arXiv
    2311.18828, eq. 8), the weight h(r) is f-distill's (arXiv 2502.15681, theorem 1). The value, mean(gradient^2) / 2,
    says how far the student is pushed; it is not a distance that has to fall.

    Args:
        x0: [B, ...] student samples; the only argument that receives a gradient.
        teacher_x0, fake_x0: [B, ...] x0-predictions at the student's noised samples.
        weight: [B] h(r), ones by default.
        eps: keeps the normaliser from zero.
        backend: "auto", "triton" or "reference".

    Returns:
        [B] float32 (float64 for float64 x0).

    Raises:
        ArgumentError: shapes, devices or dtypes that do not belong together, or a backend that cannot run.
    """
    if not x0.is_floating_point() or x0.ndim < 2:
        raise ArgumentError(f"x0: expected a float tensor [B, ...], got {x0.dtype} {tuple(x0.shape)}")
    for name, value in (("teacher_x0", teacher_x0), ("fake_x0", fake_x0)):
        if value.shape != x0.shape or value.device != x0.device or not value.is_floating_point():
            raise ArgumentError(
                f"{name}: expected a float tensor {tuple(x0.shape)} on {x0.device}, "
                f"got {value.dtype} {tuple(value.shape)} on {value.device}"
            )
    if weight is None:
        weight = torch.ones(len(x0), device=x0.device)
    elif weight.shape != x0.shape[:1] or weight.device != x0.device or not weight.is_floating_point():
        raise ArgumentError(
            f"weight: expected a float tensor ({len(x0)},) on {x0.device}, "
            f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    kernel = kernels.select("matching", backend, x0)
    with torch.no_grad():
        loss, gradient = kernel(x0, teacher_x0, fake_x0, weight, eps)
    matched: Tensor = _WithGradient.apply(x0, loss, gradient)
    return matched


def score_difference_loss(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, weight: Tensor) -> Tensor:
    """`matching_loss` without the per-sample normaliser: d/dx0 of loss.sum() = weight * (fake_x0 - teacher_x0) /
    numel_per_sample, value mean(gradient^2) / 2.

    With weight = w (alpha / sigma)^2 that is the gradient of w KL(student || teacher) at the noise level of the
    predictions, as in Diff-Instruct (arXiv 2305.18455) and VSD (arXiv 2305.16213); with fake_x0 =
    x0 it is that of SDS (arXiv 2209.14988).

    Args:
        x0: [B, ...] samples of any differentiable generator; the only argument that receives a gradient.
        teacher_x0, fake_x0: [B, ...] x0-predictions at the noised samples.
        weight: [B].

    Returns:
        [B] in the dtype of x0, at least float32.
    """
    with torch.no_grad():
        dtype = torch.promote_types(x0.dtype, torch.float32)
        g = weight.to(dtype)[:, None] * (fake_x0.to(dtype) - teacher_x0.to(dtype)).flatten(1)
        loss = g.square().mean(1) / 2
    matched: Tensor = _WithGradient.apply(x0, loss, g / g.shape[1])
    return matched


#: Weights of the difference of x0-predictions over noise levels; "normalised" is that of `matching_loss`.
SCORE_WEIGHTINGS = ("normalised", "uniform", "vsd")


def score_difference_weight(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight [B] for `score_difference_loss` at noise levels with coefficients alpha, sigma [B].

    "uniform" 1, which weighs the KL divergence by sigma^2 / alpha^2; "vsd" alpha sigma / (alpha^2 + sigma^2), the
    weight sigma^2 on differences of eps-predictions of a variance-preserving model (arXiv 2209.14988, 2312.05239).
    """
    if name == "uniform":
        return torch.ones_like(alpha)
    if name == "vsd":
        return alpha * sigma / (alpha.square() + sigma.square())
    raise ArgumentError(f"weighting: got {name!r}; {did_you_mean(name, SCORE_WEIGHTINGS[1:])}")


def score_implicit_loss(
    x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, weight: Tensor, square_weight: Tensor
) -> Tensor:
    """weight <T - F, F - x0> + square_weight |T - F|^2, means over a sample, T = teacher_x0 and F = fake_x0.

    Nothing is detached: the gradient goes through x_t into T and F, whose networks the caller freezes. The first term
    stands for a gradient that cannot be computed, that of the fake score in the student's parameters: for any weight w
    that depends on x_t alone,

        d/dtheta E[w |s_q - s_p|^2] at fixed x_t  =  d/dtheta E[2 w (s_p - s_q) . (s_q + eps / sigma)] along x_t(theta)

    (score implicit matching, arXiv 2410.16794), where s = (alpha D - x_t) / sigma^2 turns the inner
    product into alpha^2 / sigma^4 <T - F, F - x0>.

    Args:
        x0: [B, ...] student samples.
        teacher_x0, fake_x0: [B, ...] x0-predictions at x_t = alpha x0 + sigma eps, with autograd through x_t.
        weight, square_weight: [B].

    Returns:
        [B] in the dtype of x0, at least float32.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    x0, teacher_x0, fake_x0 = (value.to(dtype).flatten(1) for value in (x0, teacher_x0, fake_x0))
    difference = teacher_x0 - fake_x0
    return weight * (difference * (fake_x0 - x0)).mean(1) + square_weight * difference.square().mean(1)


def sample_normaliser(x0: Tensor, teacher_x0: Tensor, eps: float = 1e-6) -> Tensor:
    """mean|x0 - teacher_x0| + eps per sample, [B], without gradient: DMD's and SiD's scale of a loss."""
    with torch.no_grad():
        dtype = torch.promote_types(x0.dtype, torch.float32)
        return (x0.to(dtype) - teacher_x0.to(dtype)).abs().flatten(1).mean(1) + eps


def sid_loss(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Score identity distillation: <T - F, (T - x0) - alpha (T - F)>, mean over a sample (arXiv 2404.04057).

    With exact scores alpha = 1/2 has the gradient of the Fisher divergence E_q|s_p - s_q|^2 (times sigma^4 / (2
    alpha_t^2)), alpha = 1 that of SIM with squared distance; published students use 1 and 1.2. Arguments and result as
    in `score_implicit_loss`.
    """
    one = torch.ones(len(x0), device=x0.device)
    return score_implicit_loss(x0, teacher_x0, fake_x0, one, (1 - alpha) * one)


def sim_loss(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, *, huber_c: float) -> Tensor:
    """Score implicit matching with the pseudo-Huber distance d(y) = sqrt(|y|^2 + c^2) - c (arXiv 2410.16794).

    |y| is the root mean square of T - F over a sample: the score difference in units of x0, in which one c serves
    every noise level. The gradient passes through d'(y) as well, as the theorem wants. Arguments and result as in
    `score_implicit_loss`.
    """
    square = (teacher_x0 - fake_x0).flatten(1).square().mean(1)
    return score_implicit_loss(
        x0, teacher_x0, fake_x0, (square + huber_c**2).rsqrt(), torch.zeros(len(x0), device=x0.device)
    )


def uni_instruct_loss(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, h: Tensor, h_slope: Tensor) -> Tensor:
    """The expanded f-divergence E_q[h(r) |s_p - s_q|^2] (Uni-Instruct, arXiv 2505.20755), up to 2 alpha^2 / sigma^4:
    h <T - F, F - x0> + (h - r h') / 2 |T - F|^2.

    The second term is what the student's own density adds through r and vanishes for forward KL alone. The gradient
    is exact if it also passes through h(r(x_t)) and r h'(r(x_t)); detached they bias it, and noticeably: for forward KL
    between Gaussians, the gradient in the scale loses nearly a third (`test_a_detached_weight_is_biased`).

    Args:
        h, h_slope: [B] h(r) and r h'(r), r being the density ratio at x_t.

    Others, and the result, as in `score_implicit_loss`.
    """
    return score_implicit_loss(x0, teacher_x0, fake_x0, h, (h - h_slope) / 2)


def denoising_weight(
    name: str, alpha: Tensor, sigma: Tensor, *, sigma_data: float = 0.5, min_snr_gamma: float = 5.0
) -> Tensor:
    """Weight [B] of the squared x0-error at noise levels with coefficients alpha, sigma [B].

    With s = sigma / alpha: "edm" 1 / s^2 + 1 / sigma_data^2 (arXiv 2206.00364, table 1); "inverse-sigma2" 1 / s^2, the
    eps-error; "min-snr" min(1 / s^2, gamma) (arXiv 2303.09556, eq. 6); "uniform" 1.
    """
    snr = (alpha / sigma).square()
    if name == "edm":
        return snr + 1 / sigma_data**2
    if name == "inverse-sigma2":
        return snr
    if name == "min-snr":
        return snr.clamp(max=min_snr_gamma)
    if name == "uniform":
        return torch.ones_like(snr)
    raise ArgumentError(
        f"weighting: got {name!r}; {did_you_mean(name, ('edm', 'inverse-sigma2', 'min-snr', 'uniform'))}"
    )


def denoising_loss(prediction: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """weight * mean squared error of the x0-prediction. prediction, x0 [B, ...], weight [B] -> [B]; x0 is detached."""
    return weight * regression_loss(prediction, x0)


def regression_loss(prediction: Tensor, x0: Tensor) -> Tensor:
    """Mean squared error over a sample; [B, ...], [B, ...] -> [B]; x0 is detached."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - x0.detach().to(dtype)).square().flatten(1).mean(1)


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating -log D(fake) = softplus(-logit), mean over heads. [B] or [B, H] -> [B]."""
    return F.softplus(-fake_logits.float()).reshape(len(fake_logits), -1).mean(1)


def gan_discriminator_loss(logits: Tensor, *, real: bool) -> Tensor:
    """-log D(real) = softplus(-logit), or -log(1 - D(fake)) = softplus(logit), mean over heads. [B] or [B, H] -> [B].

    At its minimum the logit is log(p_real / p_fake).
    """
    return F.softplus(-logits.float() if real else logits.float()).reshape(len(logits), -1).mean(1)


def r1_penalty(real_logits: Tensor, x_t: Tensor) -> Tensor:
    """||d logit / d x_t||^2 per sample, of the mean logit over heads (Mescheder et al. 2018, arXiv 1801.04406, eq. 9,
    without gamma / 2).

    Args:
        real_logits: [B] or [B, H], computed from x_t with autograd.
        x_t: [B, ...], the discriminator's real input, requiring a gradient.

    Returns:
        [B], differentiable in the discriminator's parameters.
    """
    total = real_logits.float().reshape(len(real_logits), -1).mean(1).sum()
    (gradient,) = torch.autograd.grad(total, x_t, create_graph=True)
    return gradient.flatten(1).square().sum(1)

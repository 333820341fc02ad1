"""One pure function per loss: per-sample values [B], targets detached inside, reduction left to the caller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fdistill import kernels
from fdistill.errors import ArgumentError, did_you_mean


class _Matching(torch.autograd.Function):
    """Carries the gradient that the forward pass has already computed."""

    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, weight: Tensor, eps: float, backend: str
    ) -> Tensor:
        loss: Tensor
        loss, gradient = kernels.select("matching", backend, x0)(x0, teacher_x0, fake_x0, weight, eps)
        ctx.save_for_backward(gradient)
        ctx.like = (x0.shape, x0.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        shape, dtype = ctx.like
        return (gradient * upstream[0][:, None]).to(dtype).reshape(shape), None, None, None, None, None


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
    loss: Tensor = _Matching.apply(x0, teacher_x0.detach(), fake_x0.detach(), weight.detach(), eps, backend)
    return loss


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
    return weight * (prediction.float() - x0.detach().float()).square().flatten(1).mean(1)


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

"""Each loss is one pure function. It returns per-sample values [B], detaches its targets and does not reduce further.

Where a loss takes `Tensor | Prediction`, a tensor is an x0-prediction. A `Prediction` is a network's raw output; it
becomes an x0-prediction inside the loss, in the one pass that the loss makes over the data anyway, and needs the noised
samples x_t for that. The formulas, where T, F and x0 are one sample of n numbers, and h and other weights constants:

    matching_loss           gradient in x0:  h (F - T) / max(mean|x0 - T|, floor) / n
    score_difference_loss   gradient in x0:  w (F - T) / n
    denoising_loss          w mean((D - x0)^2)
    regression_loss         mean((D - x0)^2)
    sid_loss                mean((T - F) (T - x0 - alpha (T - F)))
    sim_loss                mean((T - F) (F - x0)) / sqrt(mean((T - F)^2) + c^2)
    uni_instruct_loss       h mean((T - F) (F - x0)) + (h - r h') / 2 mean((T - F)^2)
    gan_generator_loss      softplus(-l(fake))
    gan_discriminator_loss  softplus(-l(real)), softplus(l(fake))
    r1_penalty              |d l(real) / d x_t|^2
    approximate_r1          (l(x_t) - l(x_t + noise))^2
    noise_kl_loss           (mean(eps)^2 + var(eps) - 1 - log var(eps)) / 2

T and F are the x0-predictions of teacher and fake score at x_t, D is any x0-prediction, l a discriminator's logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.kernels.checks import check_positive, wide
from fdistill.kernels.denoising import denoising
from fdistill.kernels.implicit import implicit
from fdistill.kernels.matching import matching
from fdistill.prediction import Prediction, as_prediction

__all__ = [
    "ImplicitMeans",
    "approximate_r1",
    "denoising_loss",
    "denoising_weight",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "implicit_means",
    "matching_loss",
    "noise_kl_loss",
    "r1_penalty",
    "regression_loss",
    "score_difference_loss",
    "score_difference_weight",
    "sid_loss",
    "sim_loss",
    "uni_instruct_loss",
]

#: The normaliser of a sample, mean|x0 - T|, is at least this, so that a sample at the prediction has a finite push.
NORMALISER_FLOOR = 1e-6


def matching_loss(
    x0: Tensor,
    teacher_x0: Tensor | Prediction,
    fake_x0: Tensor | Prediction,
    *,
    weight: Tensor | None = None,
    floor: float = NORMALISER_FLOOR,
    x_t: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Distribution matching: moves the student's x0 along weight * (teacher_x0 - fake_x0).

    d/dx0 of loss.sum() = weight * (fake_x0 - teacher_x0) / max(mean|x0 - teacher_x0|, floor) / numel_per_sample

    The difference of x0-predictions is sigma^2 / alpha times that of the scores. The normaliser is DMD's (arXiv
    2311.18828, eq. 8), the weight h(r) is f-distill's (arXiv 2502.15681, theorem 1). The value is
    mean((numel_per_sample gradient)^2) / 2: it says how far the student is pushed, and need not fall in training.

    Args:
        x0: [B, ...] student samples; the only argument that receives a gradient.
        teacher_x0, fake_x0: [B, ...] x0-predictions at the student's noised samples, or networks' outputs there. A
            teacher's `Prediction` with `unconditional` and `guidance_scale` is guided in the same pass.
        weight: [B] h(r); ones by default.
        floor: above 0; the least that is divided by. CDM (arXiv 2605.06376) has 0.1.
        x_t: [B, ...] the noised samples, needed if networks' outputs are given.
        backend: "auto", "triton" or "reference".

    Returns:
        [B] float32 (float64 for float64 x0).

    Raises:
        ArgumentError: shapes, devices or dtypes do not match, or the backend cannot run.
    """
    if weight is None:
        weight = torch.ones(len(x0), device=x0.device)
    teacher, fake = as_prediction(teacher_x0), as_prediction(fake_x0)
    return matching(x0, teacher, fake, weight, floor=floor, x_t=x_t, backend=backend)


def score_difference_loss(
    x0: Tensor,
    teacher_x0: Tensor | Prediction,
    fake_x0: Tensor | Prediction,
    weight: Tensor,
    *,
    x_t: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`matching_loss` without the normaliser.

    d/dx0 of loss.sum() = weight * (fake_x0 - teacher_x0) / numel_per_sample

    With weight = w (alpha / sigma)^2 that is the gradient of w KL(student || teacher) at the noise level of the
    predictions, as in Diff-Instruct (arXiv 2305.18455) and VSD (arXiv 2305.16213); with fake_x0 = x0 it is that of SDS
    (arXiv 2209.14988).

    Args:
        x0: [B, ...] samples of any differentiable generator; the only argument that receives a gradient.
        weight: [B].

    Other arguments, the result and the errors are as in `matching_loss`.
    """
    teacher, fake = as_prediction(teacher_x0), as_prediction(fake_x0)
    return matching(x0, teacher, fake, weight, floor=None, x_t=x_t, backend=backend)


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


class ImplicitMeans(NamedTuple):
    """The means over a sample, [B], that implicit objectives combine; T = teacher_x0 and F = fake_x0."""

    inner: Tensor  #: (T - F)(F - x0)
    square: Tensor  #: (T - F)^2
    distance: Tensor  #: |x0 - T|, without gradient

    def normaliser(self, floor: float = NORMALISER_FLOOR) -> Tensor:
        """max(mean|x0 - T|, floor): DMD's and SiD's scale of a loss."""
        return self.distance.clamp(min=floor)


def implicit_means(
    x0: Tensor,
    teacher_x0: Tensor | Prediction,
    fake_x0: Tensor | Prediction,
    *,
    x_t: Tensor | None = None,
    backend: str = "auto",
) -> ImplicitMeans:
    """The means that SiD, SIM and Uni-Instruct combine. Only the last is detached: gradients reach x_t through T and F,
    whose networks the caller freezes.

    The inner product replaces a gradient that cannot be computed: that of the fake score with respect to the student's
    parameters. For any weight w that depends on x_t alone,

        d/dtheta E[w |s_q - s_p|^2] at fixed x_t  =  d/dtheta E[2 w (s_p - s_q) . (s_q + eps / sigma)] along x_t(theta)

    (score implicit matching, arXiv 2410.16794), where s = (alpha D - x_t) / sigma^2 turns the inner
    product into alpha^2 / sigma^4 <T - F, F - x0>.

    Args:
        x0: [B, ...] student samples.
        teacher_x0, fake_x0: [B, ...] x0-predictions at x_t = alpha x0 + sigma eps, or networks' outputs there, with
            autograd through x_t.
        x_t: [B, ...] the noised samples, needed if networks' outputs are given.
        backend: "auto", "triton" or "reference".

    Returns:
        Means in the dtype of x0, at least float32.

    Raises:
        ArgumentError: shapes, devices or dtypes do not match, or the backend cannot run.
    """
    teacher, fake = as_prediction(teacher_x0), as_prediction(fake_x0)
    inner, square, distance = implicit(x0, teacher, fake, x_t=x_t, backend=backend).unbind()
    return ImplicitMeans(inner, square, distance.detach())


def sid_loss(means: ImplicitMeans, *, alpha: float = 1.0) -> Tensor:
    """Score identity distillation: <T - F, (T - x0) - alpha (T - F)>, mean over a sample, [B] (arXiv 2404.04057).

    With exact scores alpha = 1/2 has the gradient of the Fisher divergence E_q|s_p - s_q|^2 (times sigma^4 / (2
    alpha_t^2)), alpha = 1 that of SIM with squared distance; published students use 1 and 1.2.
    """
    return means.inner + (1 - alpha) * means.square


def sim_loss(means: ImplicitMeans, *, huber_c: float) -> Tensor:
    """Score implicit matching with the pseudo-Huber distance d(y) = sqrt(|y|^2 + c^2) - c, [B] (arXiv 2410.16794).

    |y| is the root mean square of T - F over a sample: the score difference in units of x0, in which one c serves
    every noise level. The gradient passes through d'(y) as well, as the theorem requires.
    """
    return means.inner * (means.square + huber_c**2).rsqrt()


def uni_instruct_loss(means: ImplicitMeans, h: Tensor, h_slope: Tensor) -> Tensor:
    """The expanded f-divergence E_q[h(r) |s_p - s_q|^2] (Uni-Instruct, arXiv 2505.20755), up to 2 alpha^2 / sigma^4:
    h <T - F, F - x0> + (h - r h') / 2 |T - F|^2, [B].

    The second term comes from the student's density, on which r depends; it vanishes only for forward KL. The gradient
    is exact if it also passes through h(r(x_t)) and r h'(r(x_t)). Detaching them biases it noticeably: for forward KL
    between Gaussians, the gradient in the scale loses nearly a third (`test_a_detached_weight_is_biased`).

    Args:
        h, h_slope: [B] h(r) and r h'(r), r being the density ratio at x_t.
    """
    return h * means.inner + (h - h_slope) / 2 * means.square


#: Names that `denoising_weight` knows.
DENOISING_WEIGHTINGS = ("edm", "inverse-sigma2", "v", "flow", "min-snr", "uniform")


def denoising_weight(
    name: str, alpha: Tensor, sigma: Tensor, *, sigma_data: float = 0.5, min_snr_gamma: float = 5.0
) -> Tensor:
    """Weight [B] of the squared x0-error at noise levels with coefficients alpha, sigma [B].

    With s = sigma / alpha: "edm" 1 / s^2 + 1 / sigma_data^2 (arXiv 2206.00364, table 1); "inverse-sigma2" 1 / s^2, the
    eps-error; "v" (alpha^2 + sigma^2)^2 / sigma^2, the v-error; "flow" (alpha + sigma)^2 / sigma^2, the error of the
    velocity; "min-snr" min(1 / s^2, gamma) (arXiv 2303.09556, eq. 6); "uniform" 1, the x0-error.

    Raises:
        ArgumentError: the name is unknown, or a sigma is 0 (checked only if sigma is on the CPU).
    """
    if name == "uniform":
        return torch.ones_like(sigma)
    check_positive("sigma", sigma)
    snr = (alpha / sigma).square()
    if name == "edm":
        return snr + 1 / sigma_data**2
    if name == "inverse-sigma2":
        return snr
    if name == "v":
        return ((alpha.square() + sigma.square()) / sigma).square()
    if name == "flow":
        return ((alpha + sigma) / sigma).square()
    if name == "min-snr":
        return snr.clamp(max=min_snr_gamma)
    raise ArgumentError(f"weighting: got {name!r}; {did_you_mean(name, DENOISING_WEIGHTINGS)}")


def denoising_loss(
    prediction: Tensor | Prediction,
    x0: Tensor,
    weight: Tensor,
    *,
    x_t: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """weight * mean squared error of an x0-prediction.

    Args:
        prediction: [B, ...] x0-predictions, or outputs of a network at x_t; the only argument that receives a gradient.
        x0: [B, ...] the target.
        weight: [B].
        x_t: [B, ...] the noised samples, needed if a network's output is given.
        backend: "auto", "triton" or "reference".

    Returns:
        [B] float32 (float64 for float64 predictions).

    Raises:
        ArgumentError: shapes, devices or dtypes do not match, or the backend cannot run.
    """
    return denoising(as_prediction(prediction), x0, weight, x_t=x_t, backend=backend)


def regression_loss(prediction: Tensor, x0: Tensor) -> Tensor:
    """Mean squared error over a sample; [B, ...], [B, ...] -> [B]; x0 is detached."""
    return denoising_loss(prediction, x0, torch.ones(len(x0), device=x0.device))


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
        x_t: [B, ...], the discriminator's real input, requiring a gradient. For a network's input, input_scale x_t, the
            result times input_scale^2 is the penalty.

    Returns:
        [B], differentiable in the discriminator's parameters.
    """
    total = real_logits.float().reshape(len(real_logits), -1).mean(1).sum()
    (gradient,) = torch.autograd.grad(total, x_t, create_graph=True)
    return gradient.float().flatten(1).square().sum(1)


def approximate_r1(real_logits: Tensor, noised_logits: Tensor) -> Tensor:
    """Mean over heads of (l(x_t) - l(x_t + sigma n))^2, n standard normal: R1 without a second derivative (APT, arXiv
    2501.08316).

    For small sigma its expectation over n is sigma^2 ||d l / d x_t||^2, the mean over heads of what `r1_penalty` is for
    one.

    Args:
        real_logits, noised_logits: [B] or [B, H], at x_t and at x_t + sigma n.

    Returns:
        [B] float32.
    """
    return (real_logits.float() - noised_logits.float()).square().reshape(len(real_logits), -1).mean(1)


def noise_kl_loss(eps: Tensor) -> Tensor:
    """KL divergence of a normal distribution with the mean and variance of predicted noise from the standard normal:
    (mean^2 + variance - 1 - log variance) / 2, the regulariser of TiUE (One-Way Ticket, arXiv 2505.21960).

    Args:
        eps: [B, K, ...] K predictions for each sample; mean and unbiased variance are over the dimensions after them.

    Returns:
        [B] float32 (float64 for float64 eps), the mean over the predictions. The published code sums over batch and
        predictions: its weight of 0.1, for 8 samples of 4 predictions, is a weight of 3.2 on the mean of this loss.
    """
    variance, mean = torch.var_mean(eps.to(wide(eps.dtype)).flatten(2), dim=2)
    return ((mean.square() + variance - 1 - variance.log()) / 2).mean(1)

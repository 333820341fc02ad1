"""Power-function averages of a run's weights, and how to compute one of them from others (EDM2, arXiv 2312.02696,
section 3 and appendix C).

After t iterations the average with exponent gamma weighs the weights of iteration tau in [0, t] by the profile
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). Its relative width sigma_rel is the standard deviation of tau / t under
p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fdistill.base.errors import ArgumentError

#: The widest profile is gamma = 0, the plain mean of all iterations; below the minimum only the last weights count.
MIN_SIGMA_REL, MAX_SIGMA_REL = 1e-4, 12**-0.5


def profile_name(sigma_rel: float) -> str:
    """The name of a power-function average among a run's averages. A constant-decay average is named by its decay."""
    return f"sigma_rel={float(sigma_rel)}"


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The gamma >= 0 of a relative width (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) in [1e-4, 12^(-1/2)];
    ArgumentError outside that range.
    """
    if not MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL:
        raise ArgumentError(
            f"sigma_rel: expected {MIN_SIGMA_REL:g} to {MAX_SIGMA_REL:.4f}, the mean of all iterations, got {sigma_rel}"
        )
    # (gamma + 2)^2 (gamma + 3) - (gamma + 1) / sigma_rel^2 is convex where gamma >= 0, and positive at 1 / sigma_rel:
    # from there Newton's method falls to the only root.
    gamma, scale = 1 / sigma_rel, sigma_rel**-2
    while True:
        value = (gamma + 2) ** 2 * (gamma + 3) - (gamma + 1) * scale
        lower = gamma - value / ((gamma + 2) * (3 * gamma + 8) - scale)
        if not lower < gamma:
            return max(gamma, 0.0)
        gamma = lower


def decay_at(gamma: float, iteration: int) -> float:
    """The decay beta = (1 - 1/t)^(gamma + 1) of update number t = `iteration` >= 1.

    The update is average = beta average + (1 - beta) weights, and the first beta is 0. The average is then the exact
    integral of the profile over weights that are constant within each iteration.
    """
    return float((1 - 1 / iteration) ** (gamma + 1))


def inner_product(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> float:
    """The integral over tau of the product of two profiles, which end at t_a and t_b > 0."""
    if t_a > t_b:
        t_a, gamma_a, t_b, gamma_b = t_b, gamma_b, t_a, gamma_a
    return float((gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (t_a / t_b) ** gamma_b / t_b)


def posthoc_weights(
    t_in: Sequence[float], gamma_in: Sequence[float], t_out: float, gamma_out: float
) -> NDArray[np.float64]:
    """Coefficients [N] float64, of sum 1, of the combination of N profiles nearest to another one in L2 over tau.

    The fit is among combinations of sum 1. A free fit of a few snapshots would scale the weights by a few per cent;
    EDM2's code makes one and then divides the coefficients by their sum, which is near this but not the nearest.
    """
    profiles = list(zip(t_in, gamma_in, strict=True))
    gram = np.array([[inner_product(*a, *b) for b in profiles] for a in profiles])
    wanted = np.array([inner_product(*a, t_out, gamma_out) for a in profiles])
    # All combinations of sum 1: the last profile alone, plus any multiples of the others' differences from it.
    start = np.eye(len(profiles))[-1]
    differences = np.vstack([np.eye(len(profiles) - 1), np.full((1, len(profiles) - 1), -1.0)])
    normal, right = differences.T @ gram @ differences, differences.T @ (wanted - gram @ start)
    fitted: NDArray[np.float64] = start + differences @ np.linalg.lstsq(normal, right, rcond=None)[0]
    return fitted

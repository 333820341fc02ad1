"""f-divergences D_f(teacher || student) = E_student[f(r)], r = p_teacher / p_student, and their gradient weights.

The gradient with respect to the generator is -E[h(r) (score_teacher - score_fake) dx/dtheta] with
h(r) = r^2 f''(r) (f-distill, arXiv 2502.15681, theorem 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.errors import ArgumentError, did_you_mean

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """An f-divergence: `f` is convex on (0, inf) with f(1) = 0, `weight` is h(r) = r^2 f''(r), both elementwise.

    Both take float tensors of density ratios r > 0, of any shape, and return that shape and dtype.
    """

    name: str
    f: Function
    weight: Function


def _box_cox(r: Tensor, power: float) -> Tensor:
    """(r^power - 1) / power, log r at power 0."""
    return torch.expm1(power * torch.log(r)) / power if power else torch.log(r)


def alpha_divergence(a: float) -> Divergence:
    """The alpha family, f(r) = (r^a - 1 - a (r - 1)) / (a (a - 1)), h(r) = r^a; a any real number.

    The limits are a = 0: -log r + r - 1 (reverse KL) and a = 1: r log r - r + 1 (forward KL). The linear term changes
    no divergence and keeps f continuous in a.

    Raises:
        ArgumentError: a is infinite or NaN.
    """
    a = float(a)
    if not math.isfinite(a):
        raise ArgumentError(f"alpha divergence: expected a finite number, got {a}")
    # Two forms of the same f, each without cancellation near its own limit.
    if abs(a) < 0.5:
        f: Function = lambda r: (r - 1 - _box_cox(r, a)) / (1 - a)  # noqa: E731
    else:
        f = lambda r: (r * _box_cox(r, a - 1) - (r - 1)) / a  # noqa: E731
    return Divergence(f"alpha({a:g})", f, lambda r: r**a)


_TABLE = [
    Divergence("reverse-kl", lambda r: -torch.log(r), torch.ones_like),
    Divergence("softened-reverse-kl", lambda r: (r + 1) * torch.log(0.5 + 0.5 / r), lambda r: 1 / (r + 1)),
    Divergence(
        "jensen-shannon",
        lambda r: torch.xlogy(r, r) - (r + 1) * torch.log((r + 1) / 2),
        lambda r: r / (r + 1),
    ),
    Divergence("squared-hellinger", lambda r: 1 - torch.sqrt(r), lambda r: torch.sqrt(r) / 4),
    Divergence("forward-kl", lambda r: torch.xlogy(r, r), lambda r: r.clone()),
    Divergence("jeffreys", lambda r: (r - 1) * torch.log(r), lambda r: r + 1),
    Divergence("neyman-chi2", lambda r: (1 - r) ** 2 / r, lambda r: 2 / r),
    Divergence("pearson-chi2", lambda r: (r - 1) ** 2, lambda r: 2 * r**2),
]

DIVERGENCES: dict[str, Divergence] = {divergence.name: divergence for divergence in _TABLE}

ALIASES = {
    "rkl": "reverse-kl",
    "sf": "softened-reverse-kl",
    "js": "jensen-shannon",
    "sh": "squared-hellinger",
    "kl": "forward-kl",
    "jf": "jeffreys",
    "neyman": "neyman-chi2",
    "pearson": "pearson-chi2",
}

_ALPHA = re.compile(r"alpha\(\s*([^)]*?)\s*\)")


def get_divergence(name: str) -> Divergence:
    """A divergence by name: a key of `DIVERGENCES`, of `ALIASES`, or "alpha(a)" with a real number a.

    Raises:
        ArgumentError: no divergence of that name; the message has the nearest one.
    """
    family = _ALPHA.fullmatch(name)
    if family:
        try:
            return alpha_divergence(float(family[1]))
        except ValueError as error:
            raise ArgumentError(
                f"divergence {name!r}: expected a finite number in the brackets, as in 'alpha(0.5)'"
            ) from error
    resolved = ALIASES.get(name, name)
    if resolved not in DIVERGENCES:
        raise ArgumentError(f"divergence: got {name!r}; {did_you_mean(name, [*DIVERGENCES, *ALIASES, 'alpha(0.5)'])}")
    return DIVERGENCES[resolved]

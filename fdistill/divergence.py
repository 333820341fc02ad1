"""f-divergences D_f(teacher || student) = E_student[f(r)], r = p_teacher / p_student, and their gradient weights.

The gradient with respect to the generator is -E[h(r) (score_teacher - score_fake) dx/dtheta] with
h(r) = r^2 f''(r) (f-distill, arXiv 2502.15681, theorem 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.base.functions import import_function
from fdistill.kernels.checks import widened

__all__ = ["DIVERGENCES", "Divergence", "divergence_from", "get_divergence"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """An f-divergence: `f` is convex on (0, inf) with f(1) = 0, `weight` is h(r) = r^2 f''(r), both elementwise.

    Both take float tensors of density ratios r > 0, of any shape, and return that shape and dtype. `powers` is (c, a,
    b) where h(r) = c r^a (1 + r)^b, which fused kernels compute; None if h has no such form.
    """

    name: str
    f: Function
    weight: Function
    powers: tuple[float, float, float] | None = None

    def weight_slope(self, r: Tensor) -> Tensor:
        """r h'(r), in the shape and dtype of r; differentiable in r."""
        return r * _derivative(self.weight, r)

    @cached_property
    def needs_ratio(self) -> bool:
        """Whether h depends on r at all; it does not for reverse KL."""
        if self.powers is not None:
            return self.powers[1:] != (0.0, 0.0)
        r = torch.logspace(-1, 1, 5, dtype=torch.float64)
        return not torch.allclose(self.weight(r), self.weight(torch.ones_like(r)), rtol=1e-9, atol=0)


def _derivative(function: Function, r: Tensor) -> Tensor:
    """The derivative of an elementwise function at r; differentiable in r if r requires a gradient."""
    with torch.enable_grad():
        at = r if r.requires_grad else r.detach().requires_grad_(True)
        value = function(at)
        if not value.requires_grad:
            return torch.zeros_like(r)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True, allow_unused=True)
    slope = torch.zeros_like(r) if slope is None else slope
    return slope if r.requires_grad else slope.detach()


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
    return Divergence(f"alpha({a:g})", f, lambda r: r**a, (1.0, a, 0.0))


#: Ratios at which `divergence_from` checks a function: a far wider range than training needs.
_EXAMINED = torch.logspace(-4, 4, 161, dtype=torch.float64)


def divergence_from(f: Function, name: str | None = None) -> Divergence:
    """Builds a custom divergence from f alone: h(r) = r^2 f''(r) by automatic differentiation, in float64 where the
    device has it. A function is checked once, and the result is cached.

    Args:
        f: elementwise on float tensors, twice differentiable by torch, convex on (0, inf), f(1) = 0.
        name: what logs and cards call it; the function's own name by default.

    Raises:
        ArgumentError: f is not elementwise or not finite, f(1) is not 0, or f is not convex; the message names a
            ratio at which this shows.
    """
    label = name or str(getattr(f, "__name__", type(f).__name__))
    try:
        return _examined(f, label)
    except TypeError:  # a callable that cannot be hashed
        return _examined.__wrapped__(f, label)


@cache
def _examined(f: Function, label: str) -> Divergence:

    def weight(r: Tensor) -> Tensor:
        wide = widened(r)

        second = _derivative(lambda at: _derivative(f, at), wide)
        return (wide.square() * second).to(r.dtype)

    r = torch.cat([_EXAMINED, torch.ones(1, dtype=torch.float64)])
    try:
        values, h = f(r), None
        if isinstance(values, Tensor) and values.shape == r.shape:
            h = weight(r)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"divergence {label!r}: f must take a float tensor of ratios and be differentiable by torch; on {len(r)} "
            f"ratios it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    if h is None:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ArgumentError(f"divergence {label!r}: f must be elementwise; {tuple(r.shape)} ratios gave {got}")
    chords = f(_EXAMINED).diff() / _EXAMINED.diff()
    kink = torch.cat([torch.zeros(1), -chords.diff(), torch.zeros(2)])  # > 0 where the slope falls
    for what, wrong, shown in (
        ("f must be finite on (0, inf)", ~torch.isfinite(values), values),
        ("f'' must be finite on (0, inf)", ~torch.isfinite(h), h / r**2),
        # f'' is a difference of terms as large as f, so the tolerance for rounding grows with f.
        ("f must be convex, f'' >= 0", h < -1e-9 * (1 + values.abs()), h / r**2),
        ("f must be convex, its slope must not fall", kink > 1e-9 * (1 + values.abs() / r), -kink),
    ):
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ArgumentError(f"divergence {label!r}: {what}; at r = {r[at].item():.4g} it is {shown[at].item():.4g}")
    if abs(values[-1].item()) > 1e-9:
        raise ArgumentError(f"divergence {label!r}: expected f(1) = 0, got f(1) = {values[-1].item():.4g}")
    if not bool((h > 0).any()):
        raise ArgumentError(
            f"divergence {label!r}: f'' = 0 at every ratio from 1e-4 to 1e4, so no student is preferred to another; "
            "expected a curved f"
        )
    return Divergence(label, f, weight)


_TABLE = [
    Divergence("reverse-kl", lambda r: -torch.log(r), torch.ones_like, (1.0, 0.0, 0.0)),
    Divergence(
        "softened-reverse-kl",
        lambda r: (r + 1) * torch.log(0.5 + 0.5 / r),
        lambda r: 1 / (r + 1),
        (1.0, 0.0, -1.0),
    ),
    Divergence(
        "jensen-shannon",
        lambda r: torch.xlogy(r, r) - (r + 1) * torch.log((r + 1) / 2),
        lambda r: r / (r + 1),
        (1.0, 1.0, -1.0),
    ),
    Divergence("squared-hellinger", lambda r: 1 - torch.sqrt(r), lambda r: torch.sqrt(r) / 4, (0.25, 0.5, 0.0)),
    Divergence("forward-kl", lambda r: torch.xlogy(r, r), lambda r: r.clone(), (1.0, 1.0, 0.0)),
    Divergence("jeffreys", lambda r: (r - 1) * torch.log(r), lambda r: r + 1, (1.0, 0.0, 1.0)),
    Divergence("neyman-chi2", lambda r: (1 - r) ** 2 / r, lambda r: 2 / r, (2.0, -1.0, 0.0)),
    Divergence("pearson-chi2", lambda r: (r - 1) ** 2, lambda r: 2 * r**2, (2.0, 2.0, 0.0)),
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

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ALPHA = re.compile(r"alpha\(\s*([^)]*?)\s*\)")


def get_divergence(name: str | Divergence | Function) -> Divergence:
    """A divergence by name: a key of `DIVERGENCES`, of `ALIASES`, "alpha(a)" with a real number a, or "module:function"
    for a custom f that Python can import (see `divergence_from`). A function f or a `Divergence` is accepted as well.

    Raises:
        ArgumentError: no divergence has that name (the message suggests the nearest one), or `divergence_from` rejects
            the function.
    """
    if isinstance(name, Divergence):
        return name
    if callable(name):
        return divergence_from(name)
    if _FUNCTION.fullmatch(name):
        try:
            f = import_function(name)
        except Exception as error:  # a user's module may raise anything
            raise ArgumentError(
                f"divergence {name!r}: {type(error).__name__}: {error}; expected module:function that Python can import"
            ) from error
        return divergence_from(f, name)
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

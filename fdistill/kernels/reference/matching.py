"""Score difference with its per-sample normaliser."""

from __future__ import annotations

from torch import Tensor

from fdistill.kernels.checks import given, wide
from fdistill.kernels.layout import as_results, expand


def matching(
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    unconditional: Tensor | None,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
    weight: Tensor,
    floor: float | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [B], direction d = F - T like x0, and scale [B]: d loss / d x0 = scale d. Statistics are float32.

    T = teacher_skip x_t + teacher_out (unconditional + guidance_scale (teacher - unconditional)), F = fake_skip x_t +
    fake_out fake; if x_t is None, the outputs are x0-predictions. With n = numel of a sample and s = weight /
    max(mean|x0 - T|, floor): scale = s / n and loss = mean((s d)^2) / 2, the value of the pseudo-target regression
    mean((x0 - sg(x0 - s d))^2) / 2 whose gradient that is. If floor is None, there is no normaliser: s = weight.
    """
    dtype = wide(x0.dtype)
    x0_, teacher, fake = (value.to(dtype) for value in (x0, teacher, fake))
    if unconditional is not None:
        unconditional = unconditional.to(dtype)
        teacher = unconditional + guidance_scale * (teacher - unconditional)
    if x_t is None:
        target, d = teacher, fake - teacher
    else:
        teacher_skip, teacher_out, fake_skip, fake_out = given(teacher_skip, teacher_out, fake_skip, fake_out)
        x_t = x_t.to(dtype)
        teacher = expand(teacher_out.to(dtype), x_t) * teacher
        target = expand(teacher_skip.to(dtype), x_t) * x_t + teacher
        # The skip parts are subtracted first: they are often equal, and can be far larger than what remains.
        skip = expand(fake_skip.to(dtype) - teacher_skip.to(dtype), x_t)
        d = skip * x_t + (expand(fake_out.to(dtype), x_t) * fake - teacher)
    s = weight.to(dtype)
    if floor is not None:
        s = s / (x0_ - target).abs().flatten(1).mean(1).clamp(min=floor)
    loss = s.square() * d.square().flatten(1).mean(1) / 2
    return loss, as_results(d, x0, x0.dtype), s / x0.shape[1:].numel()

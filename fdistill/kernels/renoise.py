"""x_t and the network's input at a noise level: operators with given noise and with a seed; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError
from fdistill.kernels import implementation
from fdistill.kernels.checks import check_rows, check_samples, wide
from fdistill.kernels.layout import empty_samples_like, network_input_like


@torch.library.custom_op("fdistill::renoise", mutates_args=())
def _renoise(
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = implementation("renoise", backend, x0).renoise(
        x0, noise, alpha, sigma, input_scale, input_dtype, channels_last
    )
    return results


@torch.library.custom_op("fdistill::renoise_seeded", mutates_args=())
def _renoise_seeded(
    x0: Tensor,
    seed: Tensor,
    first: int,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = implementation("renoise", backend, x0).renoise_seeded(
        x0, seed, first, alpha, sigma, input_scale, input_dtype, channels_last
    )
    return results


def _shapes(
    x0: Tensor, input_scale: Tensor | None, input_dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor, Tensor]:
    x_t = empty_samples_like(x0, wide(x0.dtype))
    if input_scale is None:
        return x_t, x0.new_empty(0, dtype=input_dtype)
    return x_t, network_input_like(x0, input_dtype, channels_last)


@_renoise.register_fake
def _(
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _shapes(x0, input_scale, input_dtype, channels_last)


@_renoise_seeded.register_fake
def _(
    x0: Tensor,
    seed: Tensor,
    first: int,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _shapes(x0, input_scale, input_dtype, channels_last)


@torch.library.custom_op("fdistill::renoise_backward", mutates_args=())
def _renoise_backward(
    x_t_gradient: Tensor | None,
    input_gradient: Tensor | None,
    alpha: Tensor,
    input_scale: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    like = x_t_gradient if x_t_gradient is not None else input_gradient
    assert like is not None
    gradient: Tensor = implementation("renoise", backend, like).renoise_backward(
        x_t_gradient, input_gradient, alpha, input_scale, dtype
    )
    return gradient


@_renoise_backward.register_fake
def _(
    x_t_gradient: Tensor | None,
    input_gradient: Tensor | None,
    alpha: Tensor,
    input_scale: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    like = x_t_gradient if x_t_gradient is not None else input_gradient
    assert like is not None
    return empty_samples_like(like, dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # Unpacked from the end, where both operators have the same arguments.
    *_, alpha, _, input_scale, _, _, ctx.backend = inputs
    ctx.save_for_backward(alpha, input_scale)
    ctx.dtype = inputs[0].dtype
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)  # mostly only the network's input has a gradient


def _backward(ctx: Any, x_t: Tensor | None, network_input: Tensor | None) -> tuple[Tensor | None, ...]:
    alpha, input_scale = ctx.saved_tensors
    if input_scale is None:
        network_input = None
    rest = [None] * (ctx.arguments - 1)
    if x_t is None and network_input is None:
        return None, *rest
    return _renoise_backward(x_t, network_input, alpha, input_scale, ctx.dtype, ctx.backend), *rest


_renoise.register_autograd(_backward, setup_context=_keep)
_renoise_seeded.register_autograd(_backward, setup_context=_keep)


def _check(x0: Tensor, alpha: Tensor, sigma: Tensor, input_scale: Tensor | None, channels_last: bool) -> None:
    check_samples("x0", x0)
    for name, value in (("alpha", alpha), ("sigma", sigma), ("input_scale", input_scale)):
        if value is not None:
            check_rows(name, value, x0)
    if channels_last and x0.ndim != 4:
        raise ArgumentError(f"channels_last: expected x0 [B, C, H, W], got {tuple(x0.shape)}")


def renoise(
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x_t = alpha x0 + sigma noise and, in the same pass, the network's input: input_scale x_t.

    Args:
        x0: [B, ...] of any float dtype; receives the gradients of both results.
        noise: like x0 in shape; no gradient.
        alpha, sigma: [B].
        input_scale: [B]; None if the network takes x_t itself.
        input_dtype: dtype of the network's input; that of x_t by default.
        channels_last: whether the network's input has channels last; otherwise it is laid out like x0.
        backend: "auto", "triton" or "reference".

    Returns:
        x_t, float32 (float64 for float64 x0) and laid out like x0, and the network's input.

    Raises:
        ArgumentError: shapes, devices or dtypes do not match, or the backend cannot run.
    """
    _check(x0, alpha, sigma, input_scale, channels_last)
    check_samples("noise", noise, x0)
    scale, dtype = _input_form(x0, input_scale, input_dtype, channels_last, alpha)
    x_t, network_input = _renoise(x0, noise, alpha, sigma, scale, dtype, channels_last, backend)
    return x_t, x_t if scale is None else network_input


def renoise_seeded(
    x0: Tensor,
    seed: Tensor,
    first: int,
    alpha: Tensor,
    sigma: Tensor,
    *,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`renoise` with noise that is never stored: the noise of sample i depends only on the seed and first + i,
    whatever its batch or process (`reference.renoise.counter_normal`).

    Args:
        seed: 0-d int64 on the device of x0, so that a captured graph can be replayed with another seed.
        first: index of the first sample, from 0 to 2^31 - 1.

    Other arguments, the result and the errors are as in `renoise`.
    """
    _check(x0, alpha, sigma, input_scale, channels_last)
    if seed.dtype != torch.int64 or seed.ndim or seed.device != x0.device:
        raise ArgumentError(
            f"seed: expected a 0-d int64 tensor on {x0.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    if not 0 <= first <= 2**31 - 1 - len(x0):
        raise ArgumentError(f"first: expected the index of a sample below 2^31, got {first} with {len(x0)} samples")
    scale, dtype = _input_form(x0, input_scale, input_dtype, channels_last, alpha)
    x_t, network_input = _renoise_seeded(x0, seed, first, alpha, sigma, scale, dtype, channels_last, backend)
    return x_t, x_t if scale is None else network_input


def _input_form(
    x0: Tensor, input_scale: Tensor | None, input_dtype: torch.dtype | None, channels_last: bool, alpha: Tensor
) -> tuple[Tensor | None, torch.dtype]:
    """The scale and dtype of the network's input; the scale is None if x_t itself can be that input."""
    own = wide(x0.dtype)
    dtype = own if input_dtype is None else input_dtype
    as_it_is = dtype == own and (not channels_last or x0.is_contiguous(memory_format=torch.channels_last))
    if input_scale is None and not as_it_is:
        return torch.ones_like(alpha), dtype
    return input_scale, dtype

"""x_t and the network's input at a noise level, from given or from counter-based noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdistill.kernels.checks import wide
from fdistill.kernels.layout import as_results, expand, network_input_like

_MASK = 0xFFFFFFFF


def _philox(key: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32 with ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 32-bit words in
    int64 tensors, key [2, ...] and counter [4, ...] -> [4, ...].

    Words 0 and 2 are multiplied, words 1 and 3 are mixed in, so both pairs are worked on at once.
    """

    def pair(first: int, second: int) -> Tensor:
        # Filled on the device, because a copy from the host would wait for the device.
        constants = torch.stack([key.new_full((), first), key.new_full((), second)])
        return constants.reshape(2, *[1] * (counter.ndim - 1))

    multipliers, steps = pair(0xD2511F53, 0xCD9E8D57), pair(0x9E3779B9, 0xBB67AE85)
    even, odd = counter[::2], counter[1::2]
    for _ in range(10):
        # 64-bit products wrap around, but both of their 32-bit words are still right.
        product = (multipliers * even).flip(0)
        even, odd = ((product >> 32) & _MASK) ^ odd ^ key, product & _MASK
        key = (key + steps) & _MASK
    return torch.stack([even, odd], 1).flatten(0, 1)


def counter_normal(seed: Tensor, first: int, batch: int, size: int) -> Tensor:
    """Standard normal [batch, size] float32 on the seed's device; row i depends on the seed and first + i alone.

    Element e of sample s is word e // q of the counter (e % q, s), q = ceil(size / 4), keyed by the seed; words 0 and
    1, and 2 and 3, are made normal together (Box & Muller 1958).

    Args:
        seed: 0-d int64.
        first: index of the first sample, below 2^32.
        size: numbers per sample, below 2^32.
    """
    quarter = -(-size // 4)
    counter = torch.zeros(4, batch, quarter, dtype=torch.int64, device=seed.device)
    counter[0] = torch.arange(quarter, device=seed.device)
    counter[1] = torch.arange(first, first + batch, device=seed.device)[:, None]
    key = torch.stack([seed & _MASK, (seed >> 32) & _MASK])[:, None, None]
    uniform = _philox(key, counter).float() * 2**-32
    radius = torch.sqrt(-2 * torch.log(uniform[::2] + 2**-33))
    angle = 2 * math.pi * (uniform[1::2] - 0.5)
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)  # [pairs, 2, batch, quarter]
    return normals.permute(2, 0, 1, 3).flatten(1)[:, :size]


def renoise(
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """x_t = alpha x0 + sigma noise, at least float32, and the network's input: input_scale x_t in input_dtype, with
    channels last or laid out like x0. alpha, sigma, input_scale are [B]; if input_scale is None, the second
    result is empty.
    """
    dtype = wide(x0.dtype)
    x_t = expand(alpha.to(dtype), x0) * x0.to(dtype) + expand(sigma.to(dtype), x0) * noise.to(dtype)
    x_t = as_results(x_t, x0, dtype)
    if input_scale is None:
        return x_t, x0.new_empty(0, dtype=input_dtype)
    network_input = network_input_like(x0, input_dtype, channels_last)
    return x_t, network_input.copy_(expand(input_scale.to(dtype), x0) * x_t)


def renoise_seeded(
    x0: Tensor,
    seed: Tensor,
    first: int,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """`renoise` with the noise of `counter_normal`, where sample i has the index first + i."""
    noise = counter_normal(seed, first, len(x0), x0.shape[1:].numel()).reshape(x0.shape)
    return renoise(x0, noise, alpha, sigma, input_scale, input_dtype, channels_last)


def renoise_backward(
    x_t_gradient: Tensor | None,
    input_gradient: Tensor | None,
    alpha: Tensor,
    input_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of x0 in `dtype`, from those of the two results of `renoise`; at least one of these must be given."""
    total: Tensor | None = None
    if x_t_gradient is not None:
        total = x_t_gradient.to(wide(dtype))
    if input_gradient is not None:
        assert input_scale is not None
        through = expand(input_scale.to(wide(dtype)), input_gradient) * input_gradient.to(wide(dtype))
        total = through if total is None else total + through
    assert total is not None
    gradient = expand(alpha.to(wide(dtype)), total) * total
    like = x_t_gradient if x_t_gradient is not None else input_gradient
    assert like is not None
    return as_results(gradient, like, dtype)

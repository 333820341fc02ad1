"""Exponential moving averages of many tensors: one launch per dtype, which reads the weights once for all decays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.reference.ema import ema as reference_ema
from fdistill.kernels.triton.rows import on_device

BLOCK, WARPS = 2048, 8


@triton.jit
def _ema(
    chunks_ptr,
    pointers_ptr,
    sizes_ptr,
    rates_ptr,
    tensors,
    DTYPE: tl.constexpr,
    DECAYS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """chunks [2, programs]: which tensor, and which block of it; pointers [1 + DECAYS, tensors]: values, shadows."""
    program = tl.program_id(0)
    tensor = tl.load(chunks_ptr + program)
    start = tl.load(chunks_ptr + tl.num_programs(0) + program) * BLOCK
    size = tl.load(sizes_ptr + tensor)
    # A mask of unknown alignment would split accesses into single elements, so only a tensor's last block has a mask.
    if start + BLOCK <= size:
        _blend(pointers_ptr, rates_ptr, tensors, tensor, start, size, DTYPE, DECAYS, ALIGNED, False, BLOCK)
    else:
        _blend(pointers_ptr, rates_ptr, tensors, tensor, start, size, DTYPE, DECAYS, ALIGNED, True, BLOCK)


@triton.jit
def _blend(
    pointers_ptr,
    rates_ptr,
    tensors,
    tensor,
    start,
    size,
    DTYPE: tl.constexpr,
    DECAYS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = start + tl.arange(0, BLOCK)
    inside = i < size if MASKED else None
    value_ptr = tl.load(pointers_ptr + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        value_ptr = tl.multiple_of(value_ptr, 16)
    value = tl.load(value_ptr + i, mask=inside).to(tl.float32)
    for k in tl.static_range(DECAYS):
        shadow_ptr = tl.load(pointers_ptr + (k + 1) * tensors + tensor).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            shadow_ptr = tl.multiple_of(shadow_ptr, 16)
        shadow = tl.load(shadow_ptr + i, mask=inside)
        rate = tl.load(rates_ptr + k)
        # As in torch's lerp, start from the nearer end, so that a rate of 1 copies exactly.
        change = value - shadow
        shadow = tl.where(rate < 0.5, shadow + rate * change, value - (1 - rate) * change)
        tl.store(shadow_ptr + i, shadow, mask=inside)


@lru_cache(maxsize=64)
def _tables(device: torch.device, pointers: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of the tensors' blocks, addresses and sizes; weights do not move, so these are uploaded only once."""
    blocks = [triton.cdiv(size, BLOCK) for size in sizes]
    chunks = torch.tensor(
        [[k for k, count in enumerate(blocks) for _ in range(count)], [b for count in blocks for b in range(count)]]
    )
    return chunks.to(device), torch.tensor(pointers).to(device), torch.tensor(sizes).to(device)


@lru_cache(maxsize=64)
def _rates(device: torch.device, decays: tuple[float, ...]) -> Tensor:
    """1 - decay; uploaded without waiting, since some decays change with every update."""
    rates = torch.tensor([1 - decay for decay in decays])
    return rates.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rates.to(device)


def ema(shadows: Sequence[Tensor], values: Sequence[Tensor], decays: Sequence[float]) -> None:
    """See `reference.ema`. With one decay and float32 weights this uses torch's own multi-tensor kernel, which moves
    the least possible already.
    """
    groups: dict[torch.dtype, list[int]] = {}
    plain: list[int] = []
    for k, value in enumerate(values):
        own = shadows[k :: len(values)]
        walked_alike = all(shadow.stride() == value.stride() for shadow in own)
        dense = value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)
        alone = len(decays) == 1 and value.dtype == torch.float32
        if value.numel() and walked_alike and dense and not alone and value.dtype != torch.float64:
            groups.setdefault(value.dtype, []).append(k)
        else:
            plain.append(k)
    every = range(len(decays))
    reference_ema([shadows[d * len(values) + k] for d in every for k in plain], [values[k] for k in plain], decays)
    for dtype, members in groups.items():
        own = [values[k] for k in members]
        pointers = tuple(value.data_ptr() for value in own)
        pointers += tuple(shadows[d * len(values) + k].data_ptr() for d in every for k in members)
        device = own[0].device
        sizes = tuple(value.numel() for value in own)
        chunks, table, size_table = _tables(device, pointers, sizes)
        with on_device(own[0]):
            _ema[(chunks.shape[1],)](
                chunks,
                table,
                size_table,
                _rates(device, tuple(decays)),
                len(own),
                DTYPE={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
                DECAYS=len(decays),
                ALIGNED=all(pointer % 16 == 0 for pointer in pointers),
                BLOCK=BLOCK,
                num_warps=WARPS,
            )

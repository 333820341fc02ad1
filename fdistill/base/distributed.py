"""Collectives that are no-ops in a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

T = TypeVar("T")


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum over all processes, on all of them."""
    if not _active():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def global_mean(value: Tensor) -> Tensor:
    """The mean of [B] over all processes, B being whatever it is on each; 0-d, without gradient."""
    value = value.detach()
    total, count = sum_over_processes(torch.stack([value.sum(), torch.full_like(value.sum(), len(value))]))
    mean: Tensor = total / count
    return mean


def gather_rows(value: Tensor) -> Tensor:
    """[B, ...] of every process -> [processes * B, ...], in rank order; B must be the same everywhere."""
    if not _active():
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def from_main_process(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, on all of them; or the error that it raises there."""
    if not _active():
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Replaces every gradient by its mean over processes, in one collective.

    A parameter without a gradient takes part with zeros: if processes disagreed on what to reduce, they would hang.
    """
    if not _active():
        return
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        gradients, [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
    )

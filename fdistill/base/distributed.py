"""Collectives that are no-ops in a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from fdistill.base import rng
from fdistill.base.errors import ProcessError

T = TypeVar("T")


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def exchanging() -> Iterator[None]:
    """Turns what torch raises in a collective, where another process has ended or does not answer, into one message.

    Raises:
        ProcessError: says which process this is, and what to do.
    """
    try:
        yield
    except RuntimeError as error:
        rank, processes = rng.world()
        raise ProcessError(
            f"process {rank} of {processes}: another process has ended or cannot be reached "
            f"({' '.join(str(error).split())[:200]}); its message says why; run again, with --resume if it was distill"
        ) from error


def wait_for_everyone() -> None:
    """Returns when every process has called it."""
    if _active():
        with exchanging():
            PartialState().wait_for_everyone()


@contextmanager
def first_process_of_machine_first() -> Iterator[None]:
    """The first process of each machine runs the block while its others wait; then they run it."""
    first = is_first_of_machine()
    if not first:
        wait_for_everyone()
    yield
    if first:
        wait_for_everyone()


def is_first_of_machine() -> bool:
    """Whether this process is the only one of its machine, or the first."""
    return not _active() or PartialState().is_local_main_process


def everywhere(value: bool) -> bool:
    """Whether it is true in every process."""
    if not _active():
        return value
    found: list[Any] = [None] * dist.get_world_size()
    with exchanging():
        dist.all_gather_object(found, value)
    return all(found)


def highest_later(value: int, device: torch.device) -> Callable[[], int]:
    """Asks for the highest of the processes' numbers. What is returned waits for the answer, and is best called when
    the device has had time for it: nothing else that the device was given since is waited for.
    """
    number = torch.full((), value, dtype=torch.int64, device=device)
    with exchanging():
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    if device.type != "cuda":
        return lambda: int(number)
    answer = torch.empty((), dtype=torch.int64, pin_memory=True)
    answer.copy_(number, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> int:
        copied.synchronize()
        return int(answer)

    return wait


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum over all processes, on all of them."""
    if not _active():
        return value
    total = value.clone()
    with exchanging():
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
    with exchanging():
        dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def from_main_process(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `make` returns in the main process, on all of them; or the error that it raises there.

    Args:
        group: of all processes; None for the default one.
    """
    if not _active():
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    with exchanging():
        dist.broadcast_object_list(found, group=group)
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result


def together(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `make` returns in each process; if it raises in some, the first one's error on all.

    Args:
        group: of all processes; None for the default one.
    """
    if not _active():
        return make()
    result: Any = None
    error: Exception | None = None
    try:
        result = make()
    except Exception as caught:
        error = caught
    errors: list[Any] = [None] * dist.get_world_size()
    with exchanging():
        dist.all_gather_object(errors, error, group=group)
    for raised in errors:
        if raised is not None:
            raise raised
    made: T = result
    return made


def part(value: Tensor) -> Tensor:
    """What this process holds of a tensor that may be distributed, without a copy."""
    return value.to_local() if isinstance(value, DTensor) else value

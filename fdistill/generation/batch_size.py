"""How many images a network makes at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

#: A larger batch must bring at least so many times as many images a second.
_WORTH = 1.05
#: A batch is timed so many times, or until so many seconds have passed; the fastest counts, for others use the machine.
_TIMES, _SECONDS = 5, 0.5


def fastest(make: Callable[[int], object], most: int) -> int:
    """The batch that makes most images a second, by trying 1, 2, 4, ... until doubling twice brings less than 5 % or
    memory runs out.

    Args:
        make: makes so many images, and returns when they are done.
        most: the largest batch to try.
    """
    best, rate = 1, 0.0
    size = 1
    while size <= min(most, 4 * best):
        try:
            now = size / _seconds(make, size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if now >= _WORTH * rate:
            best, rate = size, now
        size *= 2
    return best


def _seconds(make: Callable[[int], object], size: int) -> float:
    make(size)  # what happens once, such as choosing an algorithm, is not counted
    taken: list[float] = []
    while len(taken) < _TIMES and sum(taken) < _SECONDS:
        began = time.perf_counter()
        make(size)
        taken.append(time.perf_counter() - began)
    return min(taken)

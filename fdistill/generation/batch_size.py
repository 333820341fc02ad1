"""How many images a network makes at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

#: A larger batch must bring at least so many times as many images a second.
_WORTH = 1.05


def fastest(make: Callable[[int], object], most: int) -> int:
    """The batch that makes most images a second, by trying 1, 2, 4, ... until doubling brings less than 5 % or memory
    runs out.

    Args:
        make: makes so many images, and returns when they are done.
        most: the largest batch to try.
    """
    best, rate = 1, 0.0
    size = 1
    while size <= most:
        try:
            make(size)  # what happens once, such as choosing an algorithm, is not counted
            began = time.perf_counter()
            make(size)
            now = size / (time.perf_counter() - began)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if now < _WORTH * rate:
            break
        best, rate, size = size, now, 2 * size
    return best

"""How many threads torch computes with, on a CPU that other programs use as well."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

#: Seconds over which the use of cores is measured.
_WINDOW = 1.0
#: How much of a core others may use before it counts as theirs: what a quiet system does now and then. One thread
#: is as fast as two of which others take a core for about a sixth of the time (docs/speed.md).
_SPARE = 0.2
#: Where users say how many threads they want.
_FIXED = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}


class Reading(NamedTuple):
    """Seconds since different beginnings: by the clock, and of work of all programs and of this one on the cores."""

    clock: float
    everyone: float
    own: float


@contextmanager
def shared_cores(device: torch.device, *, compiled: bool = False) -> Iterator[Callable[[], None]]:
    """Gives a function to call between two steps: torch then has one thread fewer for each core that others use.

    The threads of an operation wait for its last one. Where another program has a core, that is the thread which
    shares it, and all of them are slower together than those on free cores alone. Others are all other processes, those
    that decode a run's own images too. In the end torch has the threads that it had.

    Nothing changes on other devices than CPUs, where OMP_NUM_THREADS or MKL_NUM_THREADS is set, and where the system
    does not say what its cores do. A container's limit on processor time is not seen. The number of threads changes
    results by rounding.

    Args:
        compiled: networks are run through torch.compile, which would compile again for another number of threads; so
            nothing changes.
    """
    most = torch.get_num_threads()
    follows = device.type == "cpu" and most > 1 and not compiled and not _FIXED & os.environ.keys()
    last = reading() if follows else None

    def follow() -> None:
        nonlocal last
        if last is None or time.monotonic() - last.clock < _WINDOW:
            return
        now = reading()
        if now is not None:
            torch.set_num_threads(threads(last, now, len(_cores()), most))
            last = now

    try:
        yield follow
    finally:
        if last is not None:
            torch.set_num_threads(most)


def threads(before: Reading, now: Reading, cores: int, most: int) -> int:
    """As many threads, from 1 to `most`, as there were cores that no other program used between the readings."""
    others = ((now.everyone - before.everyone) - (now.own - before.own)) / (now.clock - before.clock)
    return max(1, min(most, math.floor(cores - others + _SPARE)))


def reading() -> Reading | None:
    """How long the cores that this process may use have worked so far; None where the system does not say."""
    try:
        every = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError):  # a container without /proc/stat; macOS refused
        return None
    own = _cores()
    if len(own) < len(every):
        if max(own) >= len(every):  # some cores are off, and numbers are no places in the list
            return None
        every = [every[number] for number in own]
    worked = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in every)
    return Reading(time.monotonic(), worked, time.process_time())


def _cores() -> set[int]:
    """The cores that this process may use. Not every system can say it; then all of them."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))

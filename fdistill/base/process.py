"""What a process asks of the system's libraries before torch is imported. Imports no torch."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt


def set_up() -> None:
    """Sets what makes training faster on CPUs, where the user's environment does not say otherwise.

    OpenMP's threads sleep while they wait for one another (OMP_WAIT_POLICY=PASSIVE): by default they spin, and where
    another program has one of the cores, each spins until the system stops it. Memory that torch frees stays with the
    process (MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_): by default the system takes large tensors back, and clears
    every page of the next one. docs/speed.md has what either gains.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (AttributeError, OSError, TypeError):  # another C library
            return
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)

"""What a command asks of Python and of the system's libraries before it imports torch. Imports no torch."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Turns that a thread of OpenMP waits for the others before it sleeps; docs/speed.md has what others cost and gain.
_SPINS = "3000"


def set_up() -> None:
    """Lets OpenMP's threads wait shortly and then sleep, where the user's environment does not say how they wait.

    By default they spin for milliseconds. Where another program has one of the cores, every operation then waits until
    the system stops a spinning thread.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


@contextmanager
def importing() -> Iterator[None]:
    """Inside the block nothing looks for garbage, which imports leave little of: diffusers and torch then take a second
    less of five. What was imported is never looked at again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

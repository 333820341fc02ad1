"""SIGTERM, SIGINT and SIGUSR1 end a run after an iteration, with a checkpoint, instead of anywhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from fdistill.base import rng
from fdistill.base.distributed import highest_later
from fdistill.base.signals import SIGNALS

#: A launcher passes on a Ctrl-C that the terminal has given to every process already; that is no second one.
_ECHO = 1.0  # seconds


class Stop:
    """A context manager around training; call `received` once in each iteration, in every process.

    Inside the block the first signal is noted. A second one does at once what it would have done without this.
    """

    def __init__(self, device: torch.device):
        self._device, self._signal, self._at = device, 0, 0.0
        self._before: dict[int, Any] = {}
        self._answer: Callable[[], int] | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def received(self) -> int:
        """The signal that any process has received, 0 for none. With several processes all learn of it together, one
        iteration later, so that no device is waited for.
        """
        if rng.world()[1] == 1:
            return self._signal
        before, self._answer = self._answer, highest_later(self._signal, self._device)
        return 0 if before is None else before()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and time.monotonic() - self._at > _ECHO:
            self.__exit__()
            signal.raise_signal(number)
        elif not self._signal:
            self._signal, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            # Not by print, which the signal may have interrupted.
            os.write(2, f"\n{name}: ends after this iteration, with a checkpoint; again to end at once\n".encode())

"""Files written by a thread while training goes on; an iteration waits only while tensors are copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fdistill.base import rng
from fdistill.training.checkpoint import own_chunks


class Saver:
    """Every process must have one, and call its methods together with the others."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Another group than training's, whose collectives go on meanwhile; of CPUs, where the copies are.
        self._group: Any = dist.new_group(backend="gloo") if rng.world()[1] > 1 else None

    def save(self, tensors: Mapping[str, Tensor], write: Callable[..., object]) -> None:
        """Copies what this process holds of the tensors, and starts write(chunks=copies, group=...) in a thread.

        Waits first for an earlier one to end.

        Args:
            write: is given a group of all processes, for what they have to agree on.

        Raises:
            OutputError: the earlier one could not be written.
        """
        self.wait()
        copies = {name: chunk.copy() for name, chunk in own_chunks(tensors).items()}

        def run() -> None:
            try:
                write(chunks=copies, group=self._group)
            except BaseException as error:  # also what torch raises, which is no Exception
                self._error = error

        # A daemon, so that a second Ctrl-C does not wait for it.
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises OutputError if a checkpoint could not be written; waits for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when what was started is written; raises OutputError if it could not be."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

"""What a command asks of Python before it imports torch. Imports no torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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

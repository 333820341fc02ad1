"""Functions that are named as text, "module:function"."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any


def import_function(name: str) -> Any:
    """What "module:function" names. Raises whatever the import raises; a user's module may raise anything."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def raised_where(error: BaseException) -> str:
    """An exception of a user's own function in one line: its class, its text, and the line that raised it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text

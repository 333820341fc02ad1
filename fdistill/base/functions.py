"""Functions that are named as text, "module:function"."""

from __future__ import annotations

import importlib
from typing import Any


def import_function(name: str) -> Any:
    """What "module:function" names. Raises whatever the import raises; a user's module may raise anything."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)

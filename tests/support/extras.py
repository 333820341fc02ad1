"""Tests of what an extra installs, where the tests' own environment does not have it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs `pip install 'fdistill[quantised]'`"
)
#: Recipes that store weights in few bits, or moments in 8.
_SMALL = {"flux-dev-lora-24gb"}


def recipes(names: Iterable[str]) -> list[Any]:
    """Names of recipes as parameters of a test that runs them."""
    return [pytest.param(name, marks=needs_bitsandbytes) if name in _SMALL else name for name in names]

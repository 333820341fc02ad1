"""Tests of what an extra installs, where the tests' own environment does not have it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import diffusers
import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs `pip install 'fdistill[quantised]'`"
)
needs_qwen_image = pytest.mark.skipif(
    tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 37),
    reason="this diffusers lets Qwen-Image see the padding of prompts",
)
needs_z_image = pytest.mark.skipif(not hasattr(diffusers, "ZImagePipeline"), reason="this diffusers has no Z-Image")
#: Recipe -> what it needs: of the first, weights are in few bits and moments in 8.
_NEEDS = {"flux-dev-lora-24gb": needs_bitsandbytes, "z-image": needs_z_image, "qwen-image": needs_qwen_image}


def recipes(names: Iterable[str]) -> list[Any]:
    """Names of recipes as parameters of a test that runs them."""
    return [pytest.param(name, marks=_NEEDS[name]) if name in _NEEDS else name for name in names]

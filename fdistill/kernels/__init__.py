"""Operations of a step that are not a network, by backend.

`reference/<op>.py` is plain torch and runs everywhere; a fused `triton/<op>.py` has the same basename and signature.
"auto" takes the fused kernel where there is one that can run, and the reference elsewhere; naming a backend that
cannot run is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from torch import Tensor

from fdistill.errors import ArgumentError, did_you_mean

Backend = Literal["auto", "triton", "reference"]


@cache
def _is_fused(operation: str) -> bool:
    needed = ("triton", f"{__name__}.triton", f"{__name__}.triton.{operation}")
    return all(importlib.util.find_spec(name) is not None for name in needed)


def select(operation: str, backend: str, tensor: Tensor) -> Callable[..., Any]:
    """The implementation of `operation` for tensors like `tensor`.

    Raises:
        ArgumentError: an unknown backend, or "triton" where the operation has no fused kernel or it cannot run.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ArgumentError(f"backend: got {backend!r}; {did_you_mean(backend, ('auto', 'triton', 'reference'))}")
    fused = _is_fused(operation)
    if backend == "triton" and not fused:
        raise ArgumentError(
            f"backend: no fused kernel for {operation!r} in this version; expected 'auto' or 'reference'"
        )
    if backend == "triton" and tensor.device.type != "cuda":
        raise ArgumentError(
            f"backend: 'triton' needs CUDA tensors, got {tensor.device.type}; expected 'auto' or 'reference'"
        )
    chosen = "triton" if fused and backend != "reference" and tensor.device.type == "cuda" else "reference"
    module = importlib.import_module(f"{__name__}.{chosen}.{operation}")
    implementation: Callable[..., Any] = getattr(module, operation)
    return implementation

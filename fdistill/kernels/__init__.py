"""The operations of a step outside the networks. Each is a torch custom operator with two backends.

`<op>.py` is the operator: its arguments and their checks, shapes for `torch.compile`, and its derivative.
`reference/<op>.py` is plain torch and runs everywhere; `triton/<op>.py` has the same functions as fused kernels. "auto"
uses the kernels on a GPU that has Triton, and the reference elsewhere; naming a backend that cannot run is an error.
docs/kernels.md counts the bytes that each operation moves, and the least that it could move.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError, did_you_mean

BACKENDS = ("auto", "triton", "reference")


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _runs_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _what_is_missing(tensor: Tensor) -> str | None:
    """Why the fused kernels cannot run on a tensor like this one; None if they can."""
    if tensor.dtype == torch.float64:
        return "computes in float32, got float64"
    if tensor.device.type == "cuda":
        return None if _runs_triton(tensor.device) else "needs the triton package and a GPU of capability 8.0 or newer"
    if not interpreted():
        return f"needs CUDA tensors, got {tensor.device.type}"
    return None if importlib.util.find_spec("triton") is not None else "needs the triton package"


def implementation(operation: str, backend: str, tensor: Tensor) -> ModuleType:
    """The module that holds `operation` for tensors like `tensor`.

    Raises:
        ArgumentError: the backend is unknown, or it is "triton" and the kernels cannot run.
    """
    if backend not in BACKENDS:
        raise ArgumentError(f"backend: got {backend!r}; {did_you_mean(str(backend), BACKENDS)}")
    missing = _what_is_missing(tensor)
    if backend == "triton" and missing:
        raise ArgumentError(f"backend: 'triton' {missing}; expected 'auto' or 'reference'")
    # The interpreter is for tests: "auto" never uses it.
    fused = backend == "triton" or (backend == "auto" and tensor.device.type == "cuda" and not missing)
    return importlib.import_module(f"{__name__}.{'triton' if fused else 'reference'}.{operation}")

"""Where a command runs: processes and device by accelerate, autocast by torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fdistill.base.errors import ConfigError, ProcessError
from fdistill.base.heartbeat import watch_processes

#: Where launchers say how many processes they start; accelerate reads the same.
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start(device: str) -> tuple[PartialState, torch.device]:
    """The process's place among the launched ones (`accelerate launch`, torchrun, or one alone) and its device.

    Args:
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda" or "mps".

    Raises:
        ConfigError: a device this machine does not have.
        ProcessError: the launcher was asked for more processes than there are, or they cannot be connected.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, there in available.items() if there) if device == "auto" else device
    if not available.get(kind, False):
        have = ", ".join(name for name, there in available.items() if there)
        raise ConfigError(
            f"device: {device!r} is not available to torch {torch.__version__} here; expected auto, {have}"
        )
    # While one process computes scores or encodes prompts the others wait; torch's own limit is 10 minutes on GPUs. One
    # that has stopped or died is noticed by its heartbeat.
    try:
        state = PartialState(cpu=kind == "cpu", timeout=timedelta(hours=12))
    except RuntimeError as error:  # as torch's errors of connections are
        raise ProcessError(
            f"processes: cannot be brought together ({' '.join(str(error).split())[:300]}); check that all were "
            "started, and that no other job has the port (accelerate launch --main_process_port)"
        ) from error
    if state.num_processes == 1:
        _check_alone(kind)
    watch_processes()
    return state, torch.device(kind, state.local_process_index) if kind == "cuda" else torch.device(kind)


def _check_alone(kind: str) -> None:
    """Raises ProcessError if the environment says that a launcher was asked for several processes."""
    asked = next((os.environ[name] for name in _WORLD if os.environ.get(name, "1") != "1"), None)
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves no other trace of the number.
    unsaid = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if asked is None and not unsaid:
        return
    count = "several" if asked is None else asked
    said = " and ".join(name for name in (*_WORLD, "MASTER_ADDR") if name in os.environ)
    raise ProcessError(
        f"processes: {count} were asked for, and this is one on its own, on {kind}; on CPUs launch them with "
        "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m fdistill ...`, on GPUs without "
        f"ACCELERATE_USE_CPU; for one process, unset {said}"
    )


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for the copy where the device is a CUDA one."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """With precision "bf16" networks compute in bfloat16 inside the block; weights and losses stay float32.

    With "fp32" torch's own settings hold. On CUDA these are TensorFloat-32 in convolutions and float32 in matrix
    products, unless the environment sets TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1.
    """
    if precision != "bf16":
        return nullcontext()
    # Without its cache: torch 2.8 hands a weight that was cast under no_grad, as for the first steps of a few-step
    # student, to the pass that is differentiated, and the weight gets no gradient.
    narrow = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return narrow if device.type != "cpu" or computes_bfloat16() else _with_wide_products(narrow)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block in which autocast is off, so that matrices are multiplied in the precision of their inputs."""
    if device.type == "meta":  # tensors without memory, for which torch knows no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@cache
def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for what torch computes in bfloat16 (AVX-512, or AMX)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def _with_wide_products(narrow: torch.autocast) -> Iterator[None]:
    with narrow, _WideProducts():
        yield


def products_as_now() -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which products are computed as they are now, for what runs again outside `autocast`."""
    return _WideProducts if _WideProducts.open else nullcontext


_NARROWED = (torch.float32, torch.bfloat16, torch.float16)  # what autocast makes bfloat16 of
_PRODUCTS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
}


class _WideProducts(TorchFunctionMode):
    """Products of bfloat16 by float32's instructions, for a CPU without its own, on which torch takes twenty times as
    long for a matrix product and a hundred times for a convolution.

    Inputs are rounded to bfloat16, products summed up in float32 and the sum rounded, as hardware for bfloat16 does.
    """

    open = 0  # how many are entered

    def __enter__(self) -> Any:
        _WideProducts.open += 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _WideProducts.open -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        narrow = torch.is_autocast_enabled("cpu") or any(value.dtype == torch.bfloat16 for value in tensors)
        if not narrow or any(value.device.type != "cpu" or value.dtype not in _NARROWED for value in tensors):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda value: value.bfloat16().float(), (tuple(args), dict(kwargs)))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs).bfloat16()

"""Where a command runs: processes and device by accelerate, autocast by torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import PartialState

from fdistill.errors import ConfigError


def start(device: str) -> tuple[PartialState, torch.device]:
    """The process's place among the launched ones (`accelerate launch`, torchrun, or one alone) and its device.

    Args:
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda" or "mps".

    Raises:
        ConfigError: a device this machine does not have.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device != "auto" and not available.get(device, False):
        have = ", ".join(name for name, there in available.items() if there)
        raise ConfigError(
            f"device: {device!r} is not available to torch {torch.__version__} here; expected auto, {have}"
        )
    no_accelerator = not (available["cuda"] or available["mps"])
    state = PartialState(cpu=device == "cpu" or (device == "auto" and no_accelerator))
    chosen: torch.device = state.device
    return state, torch.device("cpu") if device == "cpu" else chosen


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """With precision "bf16" networks compute in bfloat16 inside the block; weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

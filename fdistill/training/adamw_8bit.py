"""AdamW whose moments are stored in 8 bits, by bitsandbytes (arXiv 2110.02861), and its state as plain tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fdistill.base.distributed import part
from fdistill.base.errors import ConfigError

#: Moments of parameters with fewer elements are stored in float32; of others, so many elements share a scale.
SMALL, BLOCK = 4096, 256


def make(parameters: Iterable[Parameter], setting: str, **settings: Any) -> Optimizer:
    """The optimiser, which takes the settings of torch.optim.AdamW; see `step`.

    Args:
        parameters: each whole on every process.
        setting: the config setting that asks for it, for messages.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{setting}: adamw-8bit needs bitsandbytes, which is not installed; run "
            f"`pip install 'fdistill[quantised]'`, or set {setting}=adamw"
        )
    from bitsandbytes.optim import AdamW8bit

    own = [Parameter(part(each.detach())) if isinstance(each, DTensor) else each for each in parameters]
    optimizer: Optimizer = AdamW8bit(own, min_8bit_size=SMALL, **settings)
    return optimizer


def is_8bit(optimizer: Optimizer) -> bool:
    """Whether `make` made it."""
    return not isinstance(optimizer, torch.optim.AdamW)


def step(optimizer: Optimizer, gradients: Iterable[Tensor | None], finite: Tensor) -> None:
    """One update, if `finite` is true.

    bitsandbytes counts updates on the host and waits for the device after each parameter, so that to read `finite`
    costs nothing and is the one way to leave both weights and moments as they are.

    Args:
        gradients: of the parameters that `make` was given; None for one that stays as it is.
        finite: 0-d, bool, the same on every process.
    """
    if not finite:
        return
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = None if gradient is None else part(gradient)
    optimizer.step()
    optimizer.zero_grad()


def state_like(parameter: Tensor) -> dict[str, Tensor]:
    """Tensors with the names, shapes and data types that a parameter's state has in a checkpoint, without values.

    The number of steps is a tensor here, which bitsandbytes counts up as it does its own number.
    """
    state = {"step": torch.empty((), dtype=torch.int64)}
    if parameter.numel() < SMALL:
        return {**state, **{f"state{i}": torch.empty_like(parameter, dtype=torch.float32) for i in (1, 2)}}
    for i in (1, 2):
        state[f"state{i}"] = torch.empty_like(parameter, dtype=torch.uint8)
        state[f"qmap{i}"] = torch.empty(256, device=parameter.device)
        state[f"absmax{i}"] = torch.empty(-(-parameter.numel() // BLOCK), device=parameter.device)
    return state


def state_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter's two moments take on the device."""
    moments = {name: value for name, value in state_like(parameter).items() if name[:-1] in ("state", "absmax")}
    return sum(value.numel() * value.element_size() for value in moments.values())


def as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state in `state_dict`, as tensors alone: bitsandbytes counts steps by a number and wraps what is
    quantised into a dictionary.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found |= as_tensors(value) if isinstance(value, Mapping) else {name: torch.as_tensor(value)}
    return found

"""Networks that hold exactly the tensors of a file: none missing, none left over, none of another shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError, CheckpointError


def filled(cls: type[Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path) -> Any:
    """A network of a class with exactly these tensors, in float32.

    Args:
        cls: a network class.
        config: the arguments of its constructor.
        tensors: by the names of the network's own state dict.
        source: the file, for messages.

    Raises:
        CheckpointError: there is no such network, or the tensors are not its own.
    """
    try:
        with torch.device("meta"):
            network = cls(**config)
    except (ArgumentError, TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{source}: no {cls.__name__} can be built from its settings ({' '.join(str(error).split())[:300]})"
        ) from error
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{source}: tensor {name} is missing; expected one of shape {shape}")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}; expected {shape}")
    for name in tensors:
        if name not in expected:
            raise CheckpointError(f"{source}: tensor {name} has no place in a {cls.__name__} of its settings")
    copies = {name: torch.empty(shape).copy_(tensors[name]) for name, shape in expected.items()}
    network.load_state_dict(copies, assign=True)
    return network

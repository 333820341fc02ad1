"""Counts the bytes that autograd keeps for a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_bytes(network: nn.Module, evaluate: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that are kept for backward while `evaluate` runs, without those of the network's parameters; its result."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no storage is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = evaluate()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result

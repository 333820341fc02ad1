"""The parts of networks that sharded training gathers one at a time, and how often a step does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: Modules of diffusers' networks and fdistill's own that are gathered one at a time, beside those that a network of
#: diffusers names in `_no_split_modules`. What is in none of them is gathered for the whole of a pass.
_BLOCKS = {"ResnetBlock2D", "BasicTransformerBlock", "Attention", "UNetBlock", "MPBlock"}
#: Named by diffusers as they must not be split, but too large to be gathered at once.
_TOO_LARGE = {"CrossAttnUpBlock2D", "UpBlock2D"}


@dataclass(frozen=True)
class Blocks:
    """Elements of a network's weights, frozen ones included.

    Attributes:
        largest: of its largest block.
        inside, outside: of all blocks, and of what is in none.
    """

    largest: int
    inside: int
    outside: int


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a network."""
    names = _BLOCKS.union(*(getattr(each, "_no_split_modules", None) or () for each in module.modules())) - _TOO_LARGE
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for each in module.modules():
        if type(each).__name__ in names and each not in inside:
            found.append(each)
            inside.update(each.modules())
    return found


def measure_blocks(module: nn.Module) -> Blocks:
    """The sizes of a network's blocks."""
    sizes = [_elements(block) for block in find_blocks(module)]
    return Blocks(max(sizes, default=0), sum(sizes), _elements(module) - sum(sizes))


@contextmanager
def gathers(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Counts inside the block how often the networks' weights are gathered: once in each forward pass, and once more
    if a backward pass goes through it. Parts of a pass count as their share of the blocks.
    """
    found: dict[str, float] = dict.fromkeys(networks, 0.0)
    hooks = []

    def hook_of(name: str, share: float) -> Any:
        def counted(module: nn.Module, arguments: Any, result: Any) -> None:
            if torch._C._current_graph_task_id() != -1:  # recomputed within a backward pass, which has gathered it
                return
            backward = any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(result))
            found[name] += share * (2 if backward else 1)

        return counted

    try:
        for name, network in networks.items():
            blocks = find_blocks(network)
            total = sum(map(_elements, blocks))
            hooks += [block.register_forward_hook(hook_of(name, _elements(block) / total)) for block in blocks]
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""What sharded training gathers of a network: how large its blocks are, and how often a step gathers them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fdistill.students.lora import has_adapters
from fdistill.training.sharding import gathered_blocks


@dataclass(frozen=True)
class Blocks:
    """Elements of weights, by the blocks of `training.sharding.blocks`.

    Attributes:
        largest: of the largest block.
        inside, outside: of all blocks, and of what is in none.
        heights: size of a weight's first dimension, along which it is divided -> elements of all such weights.
    """

    largest: int
    inside: int
    outside: int
    heights: Mapping[int, int]

    def share(self, shards: int) -> float:
        """Of the elements, what the process with the most has: rows are not divided, and the first has one more."""
        total = self.inside + self.outside
        most = sum(-(-height // shards) * elements / height for height, elements in self.heights.items())
        return most / total if total else 0.0


@dataclass(frozen=True)
class Network:
    """A role's network.

    Attributes:
        weights: all of them, of a network under adapters too.
        trained: those that are trained.
        adapters: whether it is adapters on another network.
    """

    weights: Blocks
    trained: Blocks
    adapters: bool


def measure(module: nn.Module) -> Network:
    """The sizes of a role's network."""
    return Network(
        _blocks(module, lambda _: True), _blocks(module, lambda each: each.requires_grad), has_adapters(module)
    )


def _blocks(module: nn.Module, counts: Callable[[nn.Parameter], bool]) -> Blocks:
    sizes = [sum(each.numel() for each in own if counts(each)) for _, own in _owned(module)]
    heights: Counter[int] = Counter()
    for each in module.parameters():
        if counts(each):
            heights[each.shape[0] if each.ndim else 1] += each.numel()
    return Blocks(max(sizes, default=0), sum(sizes), heights.total() - sum(sizes), dict(heights))


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Each block with its parameters, apart from those of a block inside of it."""
    seen: set[nn.Parameter] = set()
    for block in gathered_blocks(module):
        own = [each for each in block.parameters() if each not in seen]
        seen.update(own)
        yield block, own


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
            owned = list(_owned(network)) or [(network, list(network.parameters()))]
            sizes = [sum(each.numel() for each in own) for _, own in owned]
            for (block, _), size in zip(owned, sizes, strict=True):
                hooks.append(block.register_forward_hook(hook_of(name, size / sum(sizes))))
        yield found
    finally:
        for hook in hooks:
            hook.remove()

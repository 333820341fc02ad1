"""The blocks of a network: what is gathered from other processes at once, and what is compiled at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Modules of diffusers' networks and fdistill's own, beside those that a network of diffusers names in
#: `_no_split_modules`.
_BLOCKS = {"ResnetBlock2D", "BasicTransformerBlock", "Attention", "UNetBlock", "MPBlock"}
#: Named by diffusers as they must not be split, but too large to be gathered at once.
_TOO_LARGE = {"CrossAttnUpBlock2D", "UpBlock2D"}
#: A part of DiT's first block that the network also calls by itself.
_ALONE = {"CombinedTimestepLabelEmbeddings"}
#: Variants of a block's compiled code: blocks differ in channels and resolution, and in what is differentiated.
_VARIANTS = 1024


def blocks(module: nn.Module, smallest: int) -> list[nn.Module]:
    """The blocks of which a network consists, inner ones before those that they lie in.

    Args:
        smallest: the number of parameters that a block has at least.
    """
    names = _BLOCKS.union(*(getattr(each, "_no_split_modules", None) or () for each in module.modules())) - _TOO_LARGE
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for each in module.modules():
        name = type(each).__name__
        if name in _ALONE or (name in names and each not in inside and _parameters(each) >= smallest):
            found.append(each)
            inside.update(each.modules())
    return found[::-1]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def compile_blocks(module: nn.Module) -> None:
    """Runs each block through torch.compile from its first call on, each shape by itself."""
    for block in blocks(module, smallest=0):
        block.compile(dynamic=False)
    for name in ("cache_size_limit", "accumulated_cache_size_limit"):
        setattr(torch._dynamo.config, name, max(_VARIANTS, getattr(torch._dynamo.config, name)))


def run_block(network: Any, block: nn.Module, *inputs: Any) -> Tensor:
    """Calls a block of a network of diffusers, which with gradient checkpointing keeps its inputs alone."""
    checkpointed = network.gradient_checkpointing and torch.is_grad_enabled()
    result: Tensor = network._gradient_checkpointing_func(block, *inputs) if checkpointed else block(*inputs)
    return result

"""Converts diffusers' tensors to the names and shapes of a network's publisher, which ComfyUI and LoRA files use.

A family gives the names in tables; the functions here make a layout from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdistill.base.errors import CheckpointError


@dataclass(frozen=True)
class Original:
    """One tensor of an original checkpoint.

    Attributes:
        parts: names of the diffusers tensors that it concatenates along dimension 0.
        swapped: whether the halves are exchanged: it has shift before scale, diffusers has scale before shift.
    """

    parts: tuple[str, ...]
    swapped: bool = False


#: Name in the original checkpoint -> its contents.
Layout = dict[str, Original]

#: Where a diffusers tensor goes: the original name, and its index among the parts of that tensor.
Place = tuple[str, int]

#: A diffusers module, or a full tensor name -> its original name, alone (then the index is 0) or as a `Place`.
Table = Mapping[str, str | Place]


def look_up(name: str, table: Table) -> Place | None:
    """The place of a tensor, by its full name or its module; None if neither is in the table."""
    module, _, leaf = name.rpartition(".")
    for key, suffix in ((name, ""), (module, f".{leaf}")):
        if key in table:
            entry = table[key]
            target, place = (entry, 0) if isinstance(entry, str) else entry
            return target + suffix, place
    return None


def make_layout(
    names: Iterable[str], place: Callable[[str], Place | None], swapped: Callable[[str], bool] = lambda name: False
) -> Layout:
    """The layout of the tensors `names`.

    Args:
        names: names of the tensors in diffusers.
        place: maps such a name to its place, or to None if it has none.
        swapped: says for such a name whether the original tensor has shift before scale.

    Raises:
        CheckpointError: a tensor has no place.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        where = place(name)
        if where is None:
            raise CheckpointError(
                f"tensor {name!r} has no name in the original format; expected an architecture of the published models"
            )
        found.setdefault(where[0], {})[where[1]] = name
    return {
        target: Original(tuple(parts[i] for i in sorted(parts)), any(swapped(part) for part in parts.values()))
        for target, parts in found.items()
    }


#: Modules for queries, keys and values of an attention in diffusers: those of the image, and those of the text.
SELF_ATTENTION = ("to_q", "to_k", "to_v")
ADDED_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj")


def fused(target: str, attention: str, modules: Iterable[str], *more: str) -> dict[str, Place]:
    """Table entries of modules whose tensors are concatenated in one original tensor.

    Args:
        target: the original module.
        attention: the module of diffusers that contains `modules`.
        modules: names of the modules inside `attention`, in order.
        more: full names of further modules, outside `attention`.
    """
    names = [*(f"{attention}.{module}" for module in modules), *more]
    return {name: (target, i) for i, name in enumerate(names)}


def lists_layout(
    lists: Iterable[str], top: Table, block: Table
) -> Callable[[Collection[str], Mapping[str, Any]], Layout]:
    """The `Family.original_layout` of a network whose lists of blocks have the publisher's own names.

    Args:
        lists: names of the lists, such as "layers".
        top: table of the tensors outside the blocks.
        block: table of a block's tensors, for all lists.
    """
    in_block = re.compile(rf"((?:{'|'.join(lists)})\.\d+)\.(.+)")

    def place(name: str) -> Place | None:
        match = in_block.fullmatch(name)
        if match is None:
            return look_up(name, top)
        found = look_up(match[2], block)
        return (f"{match[1]}.{found[0]}", found[1]) if found else None

    return lambda names, config: make_layout(names, place)


_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")


def transformer_layout(
    top: Table, blocks: Mapping[str, tuple[str, Table]]
) -> Callable[[Collection[str], Mapping[str, Any]], Layout]:
    """The `Family.original_layout` of a transformer.

    Args:
        top: table of the tensors outside the blocks.
        blocks: "transformer_blocks" or "single_transformer_blocks" -> their original name, and the table of a block's
            tensors.
    """

    def layout(names: Collection[str], config: Mapping[str, Any]) -> Layout:
        def place(name: str) -> Place | None:
            match = _BLOCK.fullmatch(name)
            if match is None:
                return look_up(name, top)
            kind, number, rest = match.groups()
            original, table = blocks.get(kind, ("", {}))
            found = look_up(rest, table)
            return (f"{original}.{number}.{found[0]}", found[1]) if found else None

        # The last block of SD3 has no output for the text: its text norm has only scale and shift, like norm_out.
        matches = [match for match in map(_BLOCK.fullmatch, names) if match]
        outputs = {match[2] for match in matches if match[3].startswith("attn.to_add_out.")}

        def swapped(name: str) -> bool:
            match = _BLOCK.fullmatch(name)
            if match is None:
                return name.startswith("norm_out.linear.")
            return match[3].startswith("norm1_context.linear.") and match[2] not in outputs

        return make_layout(names, place, swapped)

    return layout


def swap_halves(value: Tensor) -> Tensor:
    """Exchanges the first and the second half of the rows."""
    first, second = value.chunk(2)
    return torch.cat([second, first])


def assemble(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original tensors, by name, made from diffusers' tensors."""
    made = {}
    for target, original in layout.items():
        values = [tensors[part] for part in original.parts]
        value = torch.cat(values) if len(values) > 1 else values[0]
        made[target] = swap_halves(value) if original.swapped else value
    return made

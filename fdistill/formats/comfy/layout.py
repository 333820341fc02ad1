"""How the tensors of an original checkpoint are made of diffusers' tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.base.errors import CheckpointError


@dataclass(frozen=True)
class Original:
    """One tensor of an original checkpoint.

    Attributes:
        parts: names of the diffusers tensors that it holds on top of each other.
        swapped: shift comes before scale, where diffusers has scale before shift: the halves are exchanged.
    """

    parts: tuple[str, ...]
    swapped: bool = False


#: Name in the original checkpoint -> what it holds.
Layout = dict[str, Original]

#: Where a diffusers tensor goes: the original name, and its place among the parts there.
Place = tuple[str, int]

#: Table entries: a diffusers module, or a full tensor name -> its original name, alone or with its place.
Table = Mapping[str, str | Place]


def look_up(name: str, table: Table) -> Place | None:
    """The place of a tensor whose full name, or whose module, is in the table."""
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
        names: of diffusers.
        place: where one of them goes, or None.
        swapped: whether the original of one of them has shift before scale.

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


def swap_halves(value: Tensor) -> Tensor:
    """Exchanges the first and the second half of the rows."""
    first, second = value.chunk(2)
    return torch.cat([second, first])


def assemble(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original tensors."""
    made = {}
    for target, original in layout.items():
        values = [tensors[part] for part in original.parts]
        value = torch.cat(values) if len(values) > 1 else values[0]
        made[target] = swap_halves(value) if original.swapped else value
    return made

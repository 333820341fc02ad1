"""Euclidean distances between two sets of rows, in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 25  # distances at a time: 128 MB in float32
_COLUMNS = 4096  # rows of the second set that are float64 at a time


def distance_blocks(rows: Tensor, others: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of the first row, distances float32 [b, M] of b rows to all others) on the device of the rows.

    ||x||^2 + ||y||^2 - 2 x.y in float64 around a common origin, rounded to float32, so that the distance of two points
    is the same number in every block and ties stay ties. Distances below 1e-6 of the points' norms are rounding errors
    and become 0.
    """
    import torch

    origin = others[:_COLUMNS].mean(0).double()
    size = max(1, _BLOCK // len(others))
    for first in range(0, len(rows), size):
        x = rows[first : first + size].double() - origin
        squares = x.square().sum(1, keepdim=True)
        parts = []
        for part in others.split(_COLUMNS):
            y = part.double() - origin
            norms = squares + y.square().sum(1)
            squared = torch.addmm(norms, x, y.T, alpha=-2)
            parts.append(squared.masked_fill_(squared < 1e-12 * norms, 0).sqrt_().float())
        yield first, torch.cat(parts, dim=1)


def neighbour_radii(rows: Tensor, neighbours: int) -> Tensor:
    """float32 [N]: the distance of each row to its k-th nearest other row of the set, k = `neighbours`."""
    import torch

    # The nearest row is the row itself, hence k + 1.
    return torch.cat([block.kthvalue(neighbours + 1, dim=1).values for _, block in distance_blocks(rows, rows)])

"""Euclidean distances between two sets of rows, in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 25  # distances at a time: 128 MB in float32
_COLUMNS = 4096  # rows of the second set in float64 at a time


def distance_blocks(rows: Tensor, others: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first row, distances float32 [b, M] of the next b rows to all others) on the device of the rows.

    ||x||^2 + ||y||^2 - 2 x.y in float64 around a common origin, rounded to float32: the distance of two points is the
    same number wherever it is computed, so ties stay ties. Below 1e-6 of the points' norms it is rounding, and is 0.
    """
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
    """float32 [N]: each row's distance to its k-th nearest other row of the set."""
    # The nearest is the row itself, hence k + 1.
    return torch.cat([block.kthvalue(neighbours + 1, dim=1).values for _, block in distance_blocks(rows, rows)])

"""The order in which a data set is visited."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.base.rng import Stream, derived_seed


class EpochOrder:
    """Visits every item once per epoch, in an order that depends on (seed, epoch) alone, so that any batch can be found
    without its predecessors.

    Args:
        items: size of the data set.
        batch_size: rows per batch; a batch may cross an epoch's end.
    """

    def __init__(self, items: int, batch_size: int, seed: int):
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def _order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, Stream.SHUFFLE, epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.items, generator=generator)
        return self._permutation

    def rows(self, batch: int) -> Tensor:
        """[batch_size] int64 indices of the batch with this number."""
        position, parts, missing = batch * self.batch_size, [], self.batch_size
        while missing:
            epoch, offset = divmod(position, self.items)
            part = self._order(epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(parts)


@dataclass(frozen=True)
class Batching:
    """How a data set is cut into batches, and which rows of each batch this process reads.

    Attributes:
        batch_size: of all processes together, a multiple of `processes`.
        seed: of the order, and of which images are mirrored.
        first: number of the first batch.
        rank, processes: each batch is cut into `processes` equal parts; this process reads part number `rank`.
    """

    batch_size: int
    seed: int
    first: int = 0
    rank: int = 0
    processes: int = 1

    @property
    def local(self) -> int:
        """Rows per batch that this process reads."""
        return self.batch_size // self.processes

    def order(self, items: int) -> EpochOrder:
        """The order of a data set of so many items."""
        return EpochOrder(items, self.batch_size, self.seed)

    def mine(self, rows: Tensor) -> Tensor:
        """This process's part of what belongs to the rows of a whole batch, [batch_size, ...]."""
        return rows[self.rank * self.local : (self.rank + 1) * self.local]

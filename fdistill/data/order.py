"""The order in which a data set is visited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fdistill.base.rng import Stream, derived_seed

_PIECE = 4096  # groups that are drawn at a time


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


class GroupOrder:
    """As `EpochOrder`, but every batch is of one group of rows: images of one shape.

    Which group a batch is of is drawn in proportion to the groups' sizes, from (seed, number of the batch); within a
    group, every row comes once before any comes again. A group with fewer rows than a batch repeats them in it.

    Args:
        groups: number of rows of each group, at least 1; the rows of a group are consecutive.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int):
        self._orders = [
            EpochOrder(count, batch_size, derived_seed(seed, Stream.GROUP_ORDER, place))
            for place, count in enumerate(groups)
        ]
        ends = list(accumulate(groups))
        self._starts, self._shares, self._seed = [0, *ends[:-1]], torch.tensor(ends) / ends[-1], seed
        self._drawn = torch.empty(0, dtype=torch.long)

    def group(self, batch: int) -> int:
        """The number of the group that a batch is of."""
        return int(self._groups(batch + 1)[batch])

    def rows(self, batch: int) -> Tensor:
        """[batch_size] int64 indices of the batch with this number."""
        group = self.group(batch)
        earlier = int((self._groups(batch) == group).sum())
        return self._orders[group].rows(earlier) + self._starts[group]

    def _groups(self, count: int) -> Tensor:
        """The groups of the first `count` batches."""
        while len(self._drawn) < count:  # in pieces, each of which depends on its own number alone
            generator = torch.Generator().manual_seed(
                derived_seed(self._seed, Stream.GROUP, len(self._drawn) // _PIECE)
            )
            draws = torch.rand(_PIECE, generator=generator, dtype=self._shares.dtype)
            self._drawn = torch.cat([self._drawn, torch.searchsorted(self._shares, draws, right=True)])
        return self._drawn[:count]


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

    def order_in_groups(self, groups: Sequence[int]) -> GroupOrder:
        """The order of a data set with so many rows of each shape."""
        return GroupOrder(groups, self.batch_size, self.seed)

    def mine(self, rows: Tensor) -> Tensor:
        """This process's part of what belongs to the rows of a whole batch, [batch_size, ...]."""
        return rows[self.rank * self.local : (self.rank + 1) * self.local]

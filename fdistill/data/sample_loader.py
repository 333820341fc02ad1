"""Batches of samples that are no images any more: cached latents, or a latent teacher's own samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fdistill.data.latents import LatentSource
from fdistill.data.loader import Batch
from fdistill.data.order import EpochOrder
from fdistill.denoiser import LatentScaling


@dataclass(frozen=True)
class ScaledLatents:
    """Cached latents as the denoiser sees them."""

    source: LatentSource
    scaling: LatentScaling

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self.source.labels

    def samples(self, rows: Tensor, draw: int) -> Tensor:
        """float32 [len(rows), C, h, w]; where latents are drawn from their moments, the draw-th time."""
        return self.scaling.to_samples(self.source.latent(rows, draw))


@dataclass(frozen=True)
class FixedSamples:
    """x0 float32 [N, C, h, w] and labels int64 [N], as they are."""

    x0: Tensor
    labels: Tensor

    def samples(self, rows: Tensor, draw: int) -> Tensor:
        """float32 [len(rows), C, h, w]."""
        return self.x0[rows]


class SampleLoader:
    """Iterates over batches number `first`, `first` + 1, ... without end, as `ImageLoader` does; their images are
    float32 samples.

    Args:
        batch_size: of all processes together, a multiple of `processes`.
        seed: of the order.
        first: number of the first batch.
        rank, processes: which rows of each global batch: the rank-th of equal parts.
    """

    def __init__(
        self,
        source: ScaledLatents | FixedSamples,
        *,
        batch_size: int,
        seed: int,
        first: int = 0,
        rank: int = 0,
        processes: int = 1,
    ):
        self.skipped: list[tuple[str, str]] = []
        self._source, self._next, local = source, first, batch_size // processes
        self._order = EpochOrder(len(source.labels), batch_size, seed)
        self._mine = slice(rank * local, (rank + 1) * local)

    def __iter__(self) -> SampleLoader:
        return self

    def __next__(self) -> Batch:
        rows = self._order.rows(self._next)[self._mine]
        batch = Batch(self._source.samples(rows, self._next), self._source.labels[rows], rows)
        self._next += 1
        return batch

    def __enter__(self) -> SampleLoader:
        return self

    def __exit__(self, *error: object) -> None:
        pass

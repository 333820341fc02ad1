"""Batches of samples that need no decoding: cached latents, a teacher's own samples, or prompts without images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fdistill.data.embeddings import Captions, Embeddings
from fdistill.data.latents import LatentBucket, LatentSource
from fdistill.data.loader import Batch
from fdistill.data.order import Batching, EpochOrder, GroupOrder
from fdistill.denoiser import LatentScaling


@runtime_checkable
class SampleSource(Protocol):
    """N samples that need no decoding."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""

    @property
    def text(self) -> Captions | None:
        """The prompts of the N samples; None if there are none."""

    @property
    def buckets(self) -> Sequence[LatentBucket] | None:
        """The shapes of rows that follow one another; None if all have one."""

    def samples(self, rows: Tensor, draw: int) -> Tensor:
        """float32 [len(rows), C, h, w] of rows that have one shape; `draw` is the batch's number, for samples that are
        drawn anew each time.
        """


@dataclass(frozen=True)
class ScaledLatents:
    """Cached latents, scaled as the denoiser sees them."""

    source: LatentSource
    scaling: LatentScaling

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self.source.labels

    @property
    def text(self) -> Captions | None:
        """The prompts of the N rows; None if none were cached with the latents."""
        return self.source.text

    @property
    def buckets(self) -> Sequence[LatentBucket] | None:
        """The shapes of the cached latents; None if all have one."""
        return self.source.buckets

    def samples(self, rows: Tensor, draw: int) -> Tensor:
        """float32 [len(rows), C, h, w]; `draw` numbers the draws from a latent's moments, and is the batch's number."""
        return self.scaling.to_samples(self.source.latent(rows, draw))


@dataclass(frozen=True)
class FixedSamples:
    """Samples that are the same each time: x0 float32 [N, C, h, w], labels int64 [N], and N prompts or None."""

    x0: Tensor
    labels: Tensor
    text: Captions | None = None
    buckets: None = None

    def samples(self, rows: Tensor, draw: int) -> Tensor:
        """float32 [len(rows), C, h, w]."""
        return self.x0[rows]


def prompts_alone(embeddings: Embeddings, sample_shape: tuple[int, ...]) -> FixedSamples:
    """A row for each prompt, for a run that reads no images. Its x0 are zeros [N, *sample_shape] without memory."""
    count = len(embeddings)
    x0 = torch.zeros(1, *sample_shape).expand(count, *sample_shape)
    return FixedSamples(x0, torch.zeros(count, dtype=torch.long), Captions(embeddings, torch.arange(count)))


class PromptsInShapes:
    """A row for each of N prompts in each of several shapes, for a run that reads no images; x0 are zeros.

    Args:
        shapes: height and width of images in pixels -> (C, h, w) of samples.
    """

    def __init__(self, embeddings: Embeddings, shapes: Mapping[tuple[int, int], tuple[int, int, int]]):
        count = len(embeddings)
        self.buckets = [LatentBucket(*pixels, count, shape) for pixels, shape in shapes.items()]
        self.labels = torch.zeros(count * len(shapes), dtype=torch.long)
        self.text = Captions(embeddings, torch.arange(count).repeat(len(shapes)))

    def samples(self, rows: Tensor, draw: int) -> Tensor:
        """float32 [len(rows), C, h, w]."""
        bucket = self.buckets[int(rows[0]) // self.buckets[0].images]
        return torch.zeros(1, *bucket.shape).expand(len(rows), *bucket.shape)


class SampleLoader:
    """Iterates over batches without end, as `ImageLoader` does, from number `batching.first` on.

    The `images` of a batch are float32 samples [B, C, h, w], and its `text` holds their prompts if the source has them.
    A source of several shapes is visited in batches of one shape each (`GroupOrder`).
    """

    def __init__(self, source: SampleSource, batching: Batching):
        self.skipped: list[tuple[str, str]] = []
        self._source, self._batching, self._next = source, batching, batching.first
        buckets = source.buckets
        self._order: EpochOrder | GroupOrder = batching.order(len(source.labels))
        if buckets is not None:
            self._order = batching.order_in_groups([bucket.images for bucket in buckets])

    def __iter__(self) -> SampleLoader:
        return self

    def __next__(self) -> Batch:
        rows = self._batching.mine(self._order.rows(self._next))
        text = self._source.text.rows(rows) if self._source.text is not None else None
        pixels = None
        if isinstance(self._order, GroupOrder):
            assert self._source.buckets is not None
            bucket = self._source.buckets[self._order.group(self._next)]
            pixels = bucket.height, bucket.width
            text = None if text is None else text.at_size(*pixels)
        batch = Batch(self._source.samples(rows, self._next), self._source.labels[rows], rows, text, pixels)
        self._next += 1
        return batch

    def __enter__(self) -> SampleLoader:
        return self

    def __exit__(self, *error: object) -> None:
        pass

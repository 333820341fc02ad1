"""Batches of decoded images, found by their number: any batch can be made without its predecessors, by any worker.

A worker decodes a whole batch at a time, as handing over single images would cost more than decoding small ones.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fdistill.base.errors import DataError, did_you_mean
from fdistill.base.rng import Stream, derived_seed
from fdistill.condition import TextCondition
from fdistill.data.order import Batching, EpochOrder
from fdistill.data.recipes import RECIPES, open_image, pixels, to_channels
from fdistill.data.source import ArraySource, Source

_PREFETCH = 4  # batches that each worker keeps ready
_CORRUPT = 0.01  # the share of a data set's items that may be unreadable
_LISTED = 20


@dataclass(frozen=True)
class Batch:
    """A batch on the CPU.

    Attributes:
        images: uint8 [B, C, H, W]; or samples, float32 [B, C, h, w].
        labels: int64 [B].
        rows: int64 [B], their places in the data set.
        text: their encoded prompts, if the data set has prompts.
        pixels: height and width of their images, if the data set has images of several shapes.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    text: TextCondition | None = None
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Plan:
    """What batch n is made of, in any process."""

    source: Source
    channels: int
    height: int
    width: int
    recipe: str
    flip: bool
    batching: Batching
    whole: int | None

    def rows(self, order: EpochOrder, number: int) -> tuple[Tensor, Tensor]:
        """This process's (rows int64 [B], flipped bool [B]) of the global batch."""
        batching, rows = self.batching, self.batching.mine(order.rows(number))
        if not self.flip:
            return rows, torch.zeros(len(rows), dtype=torch.bool)
        generator = torch.Generator().manual_seed(derived_seed(batching.seed, Stream.FLIP, number))
        return rows, batching.mine(torch.rand(batching.batch_size, generator=generator) < 0.5)

    def order(self) -> EpochOrder:
        return self.batching.order(len(self.source))

    @property
    def allowed(self) -> float:
        return min(_CORRUPT * (self.whole or len(self.source)), len(self.source) - 1)


# What a worker sends: images uint8 [B, C, H, W], the rows they are, and (row, name, reason) of the unreadable.
# Arrays travel through a pipe, as tensors would need shared memory, of which containers often have 64 MB.
_Decoded = tuple[np.ndarray[Any, Any], list[int], list[tuple[int, str, str]]]


class ImageLoader:
    """Iterates over the batches of a data set without end, from number `batching.first` on.

    Use it as a context, or `close` it. Images are decoded by worker processes only; those that are in memory and need
    no resampling are taken from there. An item that cannot be decoded is replaced by the next one that can, and counted
    in `skipped`.

    Args:
        source: the data set.
        sample_shape: (C, H, W) of the batches, C = 1 or 3.
        batching: size and order of the batches, the first of them, and this process's part of each.
        recipe: a name in `RECIPES`.
        flip: mirror half of the images, drawn from (seed, batch number, row in the batch).
        workers: processes that decode, at least 1. Batches do not depend on how many.
        whole: number of items of the data set of which the source is a part: 1 % of it may be unreadable.

    Raises:
        DataError: the recipe is unknown, or no recipe makes images of this shape. While iterating: the recipe refuses
            an image, more than 1 % of the items are unreadable (the message lists the first 20), or a worker died.
    """

    def __init__(
        self,
        source: Source,
        sample_shape: tuple[int, int, int],
        batching: Batching,
        *,
        recipe: str = "exact",
        flip: bool = False,
        workers: int = 1,
        whole: int | None = None,
    ):
        if recipe not in RECIPES:
            raise DataError(f"data {source.name}: recipe {recipe!r}; {did_you_mean(recipe, RECIPES)}")
        channels, height, width = sample_shape
        if channels not in (1, 3):
            raise DataError(
                f"data {source.name}: the teacher's samples are {channels}x{height}x{width}; images can be made grey "
                "or RGB"
            )
        self._plan, first = _Plan(source, channels, height, width, recipe, flip, batching, whole), batching.first
        self._skipped: dict[int, tuple[str, str]] = {}
        self._in_memory: Tensor | None = None
        self._workers: Any = None
        if isinstance(source, ArraySource) and source.images.shape[1:] == torch.Size(sample_shape):
            self._in_memory, self._order, self._numbers = source.images, self._plan.order(), itertools.count(first)
            return
        loader = DataLoader(
            _BatchDecoder(self._plan),
            batch_size=None,
            sampler=itertools.count(first),
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_signals,
        )
        with _own_signals():
            self._workers = iter(loader)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of each item that could not be decoded so far."""
        return list(self._skipped.values())

    def __iter__(self) -> ImageLoader:
        return self

    def __next__(self) -> Batch:
        if self._in_memory is not None:
            rows, flipped = self._plan.rows(self._order, next(self._numbers))
            images = self._in_memory[rows]
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            return Batch(images, self._plan.source.labels[rows], rows)
        if self._workers is None:
            raise StopIteration
        return self._decoded()

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; there are no more batches."""
        workers, self._workers, self._in_memory = self._workers, None, None
        if workers is not None:
            workers._shutdown_workers()  # what its __del__ calls, which a traceback that holds it would put off

    def _decoded(self) -> Batch:
        try:
            result: _Decoded | DataError = next(self._workers)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"data {self._plan.source.name}: a process that decodes images died, perhaps for lack of memory "
                f"({str(error).splitlines()[0]}); run with fewer workers or a smaller batch"
            ) from error
        if isinstance(result, DataError):
            raise result
        images, rows, skipped = result
        self._skipped.update({row: (name, reason) for row, name, reason in skipped})
        if len(self._skipped) > self._plan.allowed:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:_LISTED])
            raise DataError(
                f"data {self._plan.source.name}: {len(self._skipped)} of {len(self._plan.source)} images cannot be "
                f"decoded, more than 1 %; mend or remove them ({listed})"
            )
        return Batch(torch.from_numpy(images), self._plan.source.labels[rows], torch.tensor(rows))


def decoded_rows(source: Source, rows: Sequence[int], sample_shape: tuple[int, int, int], recipe: str) -> Tensor:
    """Some images of a data set as the loader gives them, without mirroring: uint8 [len(rows), C, H, W].

    Raises:
        DataError: one of them is unreadable, or the recipe refuses it.
    """
    channels, height, width = sample_shape
    images = []
    for row in rows:
        try:
            image = to_channels(open_image(source.encoded(row)), channels)
            images.append(pixels(RECIPES[recipe](image, height, width)))
        except Exception as error:  # PIL's decoders end in nearly any of them on damaged bytes
            raise DataError(f"data {source.name}: {source.item_name(row)} cannot be shown ({error})") from error
    return torch.from_numpy(np.stack(images))


@contextmanager
def _own_signals() -> Iterator[None]:
    """Removes the signal handler that DataLoader installs: it would raise an error in the middle of any line of
    training when a worker dies. Without it, the next wait for a batch finds the death within five seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)


def _as_it_is(batch: object) -> object:
    return batch


def _ignore_signals(worker: int) -> None:
    """Leaves Ctrl-C, and a scheduler's SIGTERM to all processes, to the main process, which still needs its batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _BatchDecoder(Dataset[_Decoded | DataError]):
    """Item n is the decoded batch n. DataErrors come back as values, as DataLoader would wrap them in a traceback."""

    def __init__(self, plan: _Plan):
        self._plan, self._order = plan, plan.order()

    def __getitem__(self, number: int) -> _Decoded | DataError:
        try:
            return self._decode(number)
        except DataError as error:
            return error

    def _decode(self, number: int) -> _Decoded:
        plan = self._plan
        wanted, flipped = plan.rows(self._order, number)
        images = np.empty((len(wanted), plan.channels, plan.height, plan.width), np.uint8)
        rows: list[int] = []
        skipped: dict[int, tuple[int, str, str]] = {}
        for place, (row, mirror) in enumerate(zip(wanted.tolist(), flipped.tolist(), strict=True)):
            image = None
            while image is None and len(skipped) <= plan.allowed:
                if row not in skipped:
                    image = self._image(row, skipped)
                row = row if image is not None else (row + 1) % len(plan.source)
            if image is None:
                break  # too many: the loader reports them
            images[place] = image[:, :, ::-1] if mirror else image
            rows.append(row)
        return images, rows, list(skipped.values())

    def _image(self, row: int, skipped: dict[int, tuple[int, str, str]]) -> np.ndarray[Any, Any] | None:
        source = self._plan.source
        try:
            image = to_channels(open_image(source.encoded(row)), self._plan.channels)
        except DataError:
            raise
        except Exception as error:  # PIL's decoders end in nearly any of them on damaged bytes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            skipped[row] = (row, source.item_name(row), reason)
            return None
        try:
            return pixels(RECIPES[self._plan.recipe](image, self._plan.height, self._plan.width))
        except (DataError, ValueError) as error:
            raise DataError(f"data {source.name}: {source.item_name(row)} {error}") from error

"""PNG files, written by threads while a GPU makes the next images."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fdistill.base.images import to_pil

#: Batches that wait to be written; making images stops until there are no more.
_WAITING = 2
#: Images that a thread writes one after another.
_TOGETHER = 16
_MOST_THREADS = 8


class ImageFiles:
    """Writes images into a folder; see `image_files`."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor | None):
        self._folder, self._pool = folder, pool
        self._batches: deque[list[Future[None]]] = deque()

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Writes images uint8 [N, C, H, W] on the CPU as <index>.png, or lets threads do it; waits while too many are
        not written yet.

        Raises:
            OSError: an image, or an earlier one, could not be written.
        """
        if self._pool is None:
            self._save(indices, images)
            return
        parts = [slice(first, first + _TOGETHER) for first in range(0, len(images), _TOGETHER)]
        self._batches.append([self._pool.submit(self._save, indices[part], images[part]) for part in parts])
        self.wait(_WAITING)

    def wait(self, waiting: int = 0) -> None:
        """Returns when at most `waiting` batches are not written; raises OSError if an image could not be."""
        while len(self._batches) > waiting:
            for each in self._batches.popleft():
                each.result()

    def _save(self, indices: Sequence[int], images: Tensor) -> None:
        for index, image in zip(indices, images, strict=True):
            to_pil(image).save(self._folder / f"{index:06d}.png")


@contextmanager
def image_files(folder: Path, device: torch.device) -> Iterator[ImageFiles]:
    """At the end of the block all images are written; raises OSError where one could not be.

    Args:
        device: what makes the images. Where that is the CPU, threads would only be in its way (docs/speed.md).
    """
    if device.type == "cpu":
        yield ImageFiles(folder, None)
        return
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="png")
    try:
        files = ImageFiles(folder, pool)
        yield files
        files.wait()
    finally:
        pool.shutdown(cancel_futures=True)

"""PNG files written by threads while the next images are made."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fdistill.base.images import to_pil

#: Batches that wait to be written; making images stops until there are no more.
_WAITING = 2


class ImageFiles:
    """Writes images into a folder; see `image_files`."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor):
        self._folder, self._pool = folder, pool
        self._batches: deque[list[Future[None]]] = deque()

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Starts to write images uint8 [N, C, H, W] as <index>.png, and waits while too many are not written yet.

        Raises:
            OSError: an earlier image could not be written.
        """
        pairs = zip(indices, images.cpu(), strict=True)
        self._batches.append([self._pool.submit(self._save, index, image) for index, image in pairs])
        self.wait(_WAITING)

    def wait(self, waiting: int = 0) -> None:
        """Returns when at most `waiting` batches are not written; raises OSError if an image could not be."""
        while len(self._batches) > waiting:
            for each in self._batches.popleft():
                each.result()

    def _save(self, index: int, image: Tensor) -> None:
        to_pil(image).save(self._folder / f"{index:06d}.png")


@contextmanager
def image_files(folder: Path) -> Iterator[ImageFiles]:
    """At the end of the block all images are written; raises OSError where one could not be."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="png")
    try:
        files = ImageFiles(folder, pool)
        yield files
        files.wait()
    finally:
        pool.shutdown(cancel_futures=True)

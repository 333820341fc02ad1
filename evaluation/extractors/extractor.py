"""The interface of feature networks: uint8 images in, one row of float32 features for each image out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fdistill.base.errors import ArgumentError

_THREADS = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="resize")


@dataclass(frozen=True)
class Extractor:
    """A frozen feature network.

    Attributes:
        name: as in `EXTRACTORS`.
        outputs: {output: number of features}.
        run: uint8 [B, C, H, W] on the CPU -> {output: float32 [B, D] on the CPU}; ArgumentError for other images.
        preparation: in words, how an image becomes the network's input; the provenance of scores repeats it.
        sha256: hash of the weights file. Empty if the weights do not determine the network; its features are then not
            cached.
        published: whether the weights are the published ones.
    """

    name: str
    outputs: Mapping[str, int]
    run: Callable[[Tensor], dict[str, Tensor]]
    preparation: str
    sha256: str
    published: bool


def runner(
    compute: Callable[[Tensor], dict[str, Tensor]],
    device: torch.device,
    shape: tuple[int | None, ...] = (3, None, None),
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Makes `Extractor.run` of a computation on images on the CPU: it checks the images and runs the computation
    without gradients, in `full_precision`.

    Args:
        shape: (C, H, W) of an image; None for a dimension of any size.
    """

    def run(images: Tensor) -> dict[str, Tensor]:
        check_images(images, shape)
        with torch.no_grad(), full_precision(device):
            return {name: rows.to("cpu", torch.float32) for name, rows in compute(images).items()}

    return run


def check_images(images: Tensor, shape: tuple[int | None, ...] = (3, None, None)) -> None:
    """Raises ArgumentError unless images are uint8 [B, *shape] with B >= 1; None in the shape stands for any size."""
    fits = images.ndim == 4 and len(images) and images.dtype == torch.uint8
    if not fits or any(want not in (None, got) for want, got in zip(shape, images.shape[1:], strict=True)):
        sizes = ", ".join("BCHW"[i + 1] if size is None else str(size) for i, size in enumerate(shape))
        raise ArgumentError(f"images: expected uint8 [B, {sizes}], got {images.dtype} {list(images.shape)}")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside the block float32 is computed as float32: without autocast and without TF32.

    TF32 is a setting of the whole process, so other threads compute in full precision meanwhile, too.
    """
    backends: Any = torch.backends
    # torch 2.9 has new settings, and refuses to read the old ones once these were set.
    if hasattr(backends.cudnn, "conv"):
        parts, setting = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn], "fp32_precision"
    else:
        parts, setting = [backends.cuda.matmul, backends.cudnn], "allow_tf32"
    before = [getattr(part, setting) for part in parts]
    try:
        for part in parts:
            setattr(part, setting, "ieee" if setting == "fp32_precision" else False)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, value in zip(parts, before, strict=True):
            setattr(part, setting, value)


def prepare_each(images: Tensor, prepare: Callable[[NDArray[Any]], Tensor]) -> Tensor:
    """Stacks prepare(image) of every image of uint8 [B, C, H, W], in threads; it takes an image as uint8 [H, W, C]."""
    return torch.stack(list(_THREADS.map(prepare, images.permute(0, 2, 3, 1).numpy())))

"""What every feature network is to the rest of the evaluation: uint8 images in, rows of float32 features out."""

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
        outputs: the width of each output by name.
        run: uint8 [B, C, H, W] on the CPU -> {output: float32 [B, D] on the CPU}; ArgumentError for anything else.
        preparation: how an image of any size becomes the network's input.
        sha256: of the weights file; empty for a network that is more than its weights: its features are not kept.
        published: the weights are the published ones.
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
    """`Extractor.run` of a computation that takes the images from the CPU: checked, without grad, in `full_precision`.

    Args:
        shape: of an image, None where any size will do.
    """

    def run(images: Tensor) -> dict[str, Tensor]:
        check_images(images, shape)
        with torch.no_grad(), full_precision(device):
            return {name: rows.to("cpu", torch.float32) for name, rows in compute(images).items()}

    return run


def check_images(images: Tensor, shape: tuple[int | None, ...] = (3, None, None)) -> None:
    """ArgumentError unless images are uint8 [B, *shape], with at least one."""
    fits = images.ndim == 4 and len(images) and images.dtype == torch.uint8
    if not fits or any(want not in (None, got) for want, got in zip(shape, images.shape[1:], strict=True)):
        sizes = ", ".join("BCHW"[i + 1] if size is None else str(size) for i, size in enumerate(shape))
        raise ArgumentError(f"images: expected uint8 [B, {sizes}], got {images.dtype} {list(images.shape)}")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside the block float32 is float32: neither autocast nor TF32.

    TF32 is a setting of the whole process: work in other threads is in full precision meanwhile, too.
    """
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 has other settings, and refuses to read the old after these
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
    """`prepare`, which takes uint8 [H, W, C], for every image of uint8 [B, C, H, W], in threads; stacked in order."""
    return torch.stack(list(_THREADS.map(prepare, images.permute(0, 2, 3, 1).numpy())))

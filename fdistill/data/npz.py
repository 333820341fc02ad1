"""Arrays in an .npz file, held in memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdistill.base.errors import DataError
from fdistill.base.reading import ARCHIVE_ERRORS, reason_of
from fdistill.data.source import ArraySource, Kind, class_labels

IMAGES, LABELS = ("images", "arr_0"), ("labels", "y", "arr_1")
_CHANNELS = (1, 3, 4)
#: The range that numbers may be meant to lie in -> how they become bytes; the first that holds them all.
_ROUNDED = {
    (0, 1): "(x * 255 + 0.5).clip(0, 255).astype('uint8')",
    (-1, 1): "(x * 127.5 + 128).clip(0, 255).astype('uint8')",
    (0, 255): "(x + 0.5).clip(0, 255).astype('uint8')",
}
_SLACK = 0.2  # of the range: what networks make overshoots it


def open_npz(path: Path) -> ArraySource:
    """Images in the array `images` or `arr_0`, and integer labels [N] in `labels`, `y` or `arr_1` if there are some.

    Images are uint8 [N, H, W, C], [N, C, H, W] (if the last size is none of 1, 3, 4) or [N, H, W].

    Raises:
        DataError: the file is unreadable, or its arrays have other names, shapes or types.
    """
    names: Sequence[str] = ()
    name = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            name = next((name for name in IMAGES if name in names), "")
            images = None if not name else read_array(archive, name)
            name = next((name for name in LABELS if name in names), "")
            labels = None if not name else read_array(archive, name)
    except ARCHIVE_ERRORS as error:
        # NumPy advises to unpickle what it does not know, which would run the file's code.
        why = "no .npz file, or one with pickled objects" if "pickle" in str(error) else reason_of(error)
        where = f"data {path}, array {name!r}" if name else f"data {path}"
        raise DataError(f"{where}: cannot be read as plain arrays ({why}); write it anew with np.savez") from error
    if images is None:
        raise DataError(f"data {path}: arrays {', '.join(names) or 'none'}; expected 'images' or 'arr_0'")
    if images.size == 0:
        raise DataError(f"data {path}: images are {images.dtype} {list(images.shape)}, none; expected at least one")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"data {path}: images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, C] in [0, 255]"
            f"{'' if images.dtype == np.uint8 else _advice(images)}"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] in _CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] not in _CHANNELS:
        raise DataError(f"data {path}: images {list(images.shape)} have neither 1, 3 nor 4 channels, first or last")
    # A copy, as one channel moved first counts as contiguous with strides by which torch takes it for channels-last.
    tensor = torch.from_numpy(np.array(images, order="C"))
    return ArraySource(str(path), tensor, *class_labels(labels, len(tensor), f"data {path}"))


def read_array(archive: Any, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """An array of an open .npz file; ValueError if its header says another size than its member has, for which memory
    would be taken before anything is read."""
    member: zipfile.ZipInfo = archive.zip.getinfo(f"{name}.npy")
    with archive.zip.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version in read_header:
            shape, _, dtype = read_header[version](file)
            size = math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and size != member.file_size - file.tell():
                raise ValueError(f"says {dtype} {list(shape)}, {size:,} bytes, and has {member.file_size:,}")
    array: np.ndarray[Any, np.dtype[Any]] = archive[name]
    return array


def _advice(images: np.ndarray[Any, np.dtype[Any]]) -> str:
    """How these numbers become uint8, as far as their range says what they are."""
    if images.dtype.kind not in "fiu":
        return ""
    least, most = float(images.min()), float(images.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        return "; it holds NaN or infinity: make the images again"
    if images.dtype.kind in "iu":
        known = least >= 0 and most <= 255 and most > 1
        return (
            "; save them as x.astype('uint8')" if known else f"; it holds {least:g} to {most:g}: bring them to [0, 255]"
        )
    for (low, high), rounded in _ROUNDED.items():
        if low - _SLACK * (high - low) <= least and most <= high + _SLACK * (high - low):
            return f"; from the range [{low}, {high}] round values x by {rounded}"
    return f"; it holds {least:g} to {most:g}: bring them to [0, 255]"


def _is_npz(where: str) -> bool:
    path = Path(where)
    return path.is_file() and path.suffix.lower() == ".npz"


KIND = Kind("an .npz file", _is_npz, lambda where: open_npz(Path(where)), file=".npz")

"""Arrays in an .npz file, held in memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from fdistill.base.errors import DataError
from fdistill.data.source import ArraySource, Kind, class_labels

_IMAGES, _LABELS = ("images", "arr_0"), ("labels", "y", "arr_1")
_CHANNELS = (1, 3, 4)


def open_npz(path: Path) -> ArraySource:
    """Images in the array `images` or `arr_0`, and integer labels [N] in `labels`, `y` or `arr_1` if there are some.

    Images are uint8 [N, H, W, C], [N, C, H, W] (if the last size is none of 1, 3, 4) or [N, H, W].

    Raises:
        DataError: the file is unreadable, or its arrays have other names, shapes or types.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            images = next((archive[name] for name in _IMAGES if name in names), None)
            labels = next((archive[name] for name in _LABELS if name in names), None)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        # NumPy advises to unpickle what it does not know, which would run the file's code.
        why = "no .npz file, or one with pickled objects" if "pickle" in str(error) else str(error)
        raise DataError(f"data {path}: cannot be read as plain arrays ({why}); write it anew with np.savez") from error
    if images is None:
        raise DataError(f"data {path}: arrays {', '.join(names) or 'none'}; expected 'images' or 'arr_0'")
    if images.size == 0:
        raise DataError(f"data {path}: images are {images.dtype} {list(images.shape)}, none; expected at least one")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"data {path}: images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, C] in [0, 255]"
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


def _is_npz(where: str) -> bool:
    path = Path(where)
    return path.is_file() and path.suffix == ".npz"


KIND = Kind("an .npz file", _is_npz, lambda where: open_npz(Path(where)), file=".npz")

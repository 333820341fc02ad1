"""CIFAR-10's 50,000 training images from its archives, Python or binary version, packed or extracted; held in memory.

https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdistill.base.errors import DataError
from fdistill.data.source import ArraySource, Kind, class_labels

_FOLDERS = {"cifar-10-batches-py": "", "cifar-10-batches-bin": ".bin"}
_ARCHIVES = {"cifar-10-python.tar.gz": "cifar-10-batches-py", "cifar-10-binary.tar.gz": "cifar-10-batches-bin"}
_PIXELS = 3 * 32 * 32


def is_cifar10(path: Path) -> bool:
    """True for one of the archives by name, for an extracted folder, or the folder around it."""
    if path.is_file():
        return path.name in _ARCHIVES
    return _extracted(path) is not None


def open_cifar10(path: Path) -> ArraySource:
    """uint8 [N, 3, 32, 32] and labels in [0, 9]; the test batch is left out.

    Raises:
        DataError: a batch is missing or damaged, or its pickle holds more than arrays, numbers and text.
    """
    batches = _archived(path) if path.is_file() else _read(path)
    images, labels = [], []
    for name, content in batches:
        where = f"data {path}, {name}"
        pixels, ids = _binary(content, where) if name.endswith(".bin") else _pickled(content, where)
        if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or len(pixels) == 0:
            raise DataError(f"{where}: images of shape {list(pixels.shape)}; expected [N, {_PIXELS}]")
        images.append(torch.from_numpy(pixels.copy()).reshape(-1, 3, 32, 32))
        labels.append(class_labels(ids, len(pixels), where)[0])
        if labels[-1].max() > 9:
            raise DataError(f"{where}: label {int(labels[-1].max())}; expected class ids from 0 to 9")
    return ArraySource(str(path), torch.cat(images), torch.cat(labels), 10)


KIND = Kind(
    "CIFAR-10", lambda where: is_cifar10(Path(where)), lambda where: open_cifar10(Path(where)), "CIFAR-10's .tar.gz"
)


def _extracted(path: Path) -> tuple[Path, str] | None:
    """(folder of the batches, their suffix)."""
    for folder in (path, *(path / name for name in _FOLDERS)):
        for suffix in _FOLDERS.values():
            if (folder / f"data_batch_1{suffix}").is_file():
                return folder, suffix
    return None


def _read(path: Path) -> list[tuple[str, bytes]]:
    found = _extracted(path)
    if found is None:
        raise DataError(f"data {path}: no data_batch_1 of CIFAR-10 in this folder; unpack its archive again")
    folder, suffix = found
    names = [f"data_batch_{number}{suffix}" for number in range(1, 6)]
    try:
        return [(name, (folder / name).read_bytes()) for name in names]
    except OSError as error:
        raise DataError(f"data {folder}: {error.filename} cannot be read; unpack CIFAR-10's archive again") from error


def _archived(path: Path) -> list[tuple[str, bytes]]:
    folder = _ARCHIVES[path.name]
    names = [f"data_batch_{number}{_FOLDERS[folder]}" for number in range(1, 6)]
    content = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None and member.name in [f"{folder}/{name}" for name in names]:
                    content[member.name.split("/")[1]] = file.read()
        return [(name, content[name]) for name in names]
    except (OSError, EOFError, tarfile.TarError, KeyError) as error:
        raise DataError(
            f"data {path}: not a whole archive of CIFAR-10, {' '.join(str(error).split())} is missing or damaged; "
            "download it again"
        ) from error


def _binary(content: bytes, where: str) -> tuple[np.ndarray[Any, Any], object]:
    if len(content) % (1 + _PIXELS):
        raise DataError(f"{where}: {len(content)} bytes; expected a multiple of {1 + _PIXELS}, a label and its pixels")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0]


def _pickled(content: bytes, where: str) -> tuple[np.ndarray[Any, Any], Any]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        return batch[b"data"].pixels, batch[b"labels"]
    except Exception as error:  # a damaged pickle can end in nearly any of them
        raise DataError(f"{where}: not a batch of CIFAR-10 ({error}); download the archive again") from error


class _Array:
    """Stands for a numpy array of uint8; numpy's own would take the type's internals from the file."""

    pixels: np.ndarray[Any, Any]

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, fortran, raw = state
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _UInt8:
    """Stands for numpy's dtype."""

    def __init__(self, code: object, *_: object):
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"its array is of type {code!r}")

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Reads containers, numbers, text and arrays of uint8, and imports nothing that a pickle names."""

    def find_class(self, module: str, name: str) -> type:
        known = {"_reconstruct": _Array, "ndarray": _Array, "dtype": _UInt8}
        if name not in known:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is no array")
        return known[name]

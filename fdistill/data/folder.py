"""A folder of image files: one sub-folder per class, or all at the top without labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fdistill.data.source import IMAGE_SUFFIXES, Encoded, class_labels, is_image
from fdistill.errors import DataError

_EXPECTED = f"expected images ({' '.join(sorted(IMAGE_SUFFIXES))}) in it, or one sub-folder of images per class"


class FolderSource:
    """Image files below one folder.

    Args:
        files: paths relative to `root`, with forward slashes.
        labels: int64 [len(files)].
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Tensor, num_classes: int | None):
        self.name, self.root, self.files = str(root), root, files
        self.labels, self.num_classes = labels, num_classes

    def __len__(self) -> int:
        return len(self.files)

    def item_name(self, index: int) -> str:
        return self.files[index]

    def encoded(self, index: int) -> Encoded:
        return (self.root / self.files[index]).read_bytes()


def image_files(root: Path) -> list[str]:
    """Image files anywhere below `root`, relative to it, sorted; hidden folders are left out."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if is_image(name)]
    return sorted(found)


def open_folder(root: Path) -> FolderSource:
    """Class ids are the positions of the sub-folders' names in sorted order; each is searched to any depth.

    Raises:
        DataError: no images, a sub-folder without any, or images both at the top and in sub-folders.
    """
    files = image_files(root)
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    flat = [name for name in files if "/" not in name]
    if not files:
        raise DataError(f"data {root}: no images in this folder; {_EXPECTED}")
    if flat and len(flat) < len(files):
        raise DataError(
            f"data {root}: images both at the top ({flat[0]}) and in sub-folders; expected one of the two, as only "
            "sub-folders are classes"
        )
    if flat:
        return FolderSource(root, files, *class_labels(None, len(files), str(root)))
    owners = [name.split("/", 1)[0] for name in files]
    empty = sorted(set(classes) - set(owners))
    if empty:
        raise DataError(
            f"data {root}: the class folder {empty[0]!r} has no images; fill it or remove it (linked "
            "folders are not followed)"
        )
    ids = {name: position for position, name in enumerate(classes)}
    return FolderSource(root, files, *class_labels([ids[owner] for owner in owners], len(files), str(root)))

"""The layout of EDM's and StyleGAN's data sets: a zip or folder of images, labelled by its dataset.json.

{"labels": [["00000/img00000000.png", 6], ...]}        or {"labels": null}
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.data.folder import FolderSource, image_files
from fdistill.data.source import Encoded, Kind, PerProcess, Source, class_labels, is_image

LABEL_FILE = "dataset.json"


class ZipSource:
    """Images that are members of a zip file; nothing is ever extracted.

    Args:
        members: their names.
        labels: int64 [len(members)].
    """

    captions: Sequence[str] | None = None

    def __init__(self, path: Path, members: Sequence[str], labels: Tensor, num_classes: int | None):
        self.name, self.members, self.labels, self.num_classes = str(path), members, labels, num_classes
        self._archive = PerProcess(partial(zipfile.ZipFile, path))

    def __len__(self) -> int:
        return len(self.members)

    def item_name(self, index: int) -> str:
        return self.members[index]

    def encoded(self, index: int) -> Encoded:
        return self._archive.get().read(self.members[index])


def open_edm_zip(path: Path) -> ZipSource:
    """A zip file of images; they have no labels if there is no dataset.json.

    Raises:
        DataError: the file is not a zip, holds no images, or its dataset.json does not label each of them with an
            integer.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            text = archive.read(LABEL_FILE) if LABEL_FILE in names else None
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"data {path}: cannot be read as a zip file ({error}); copy or download it again") from error
    images = sorted(name for name in names if is_image(name))
    if not images and any(name.endswith(".npy") for name in names):
        raise DataError(f"data {path}: holds arrays (.npy), as of latents, and no images; expected the zip of images")
    if not images:
        raise DataError(f"data {path}: no images in this zip file; expected .png, .jpg, .webp or .bmp members")
    return ZipSource(path, images, *_labels(text, images, str(path)))


def open_edm_folder(root: Path) -> FolderSource:
    """A folder of images with a dataset.json.

    Raises:
        DataError: it holds no images, or its dataset.json does not label each of them with an integer.
    """
    images = image_files(root)
    if not images:
        raise DataError(f"data {root}: a {LABEL_FILE} but no images; expected the images that it names")
    return FolderSource(root, images, *_labels((root / LABEL_FILE).read_bytes(), images, str(root)))


def _is_edm(where: str) -> bool:
    path = Path(where)
    return (path / LABEL_FILE).is_file() if path.is_dir() else path.is_file() and path.suffix == ".zip"


def _open(where: str) -> Source:
    path = Path(where)
    return open_edm_folder(path) if path.is_dir() else open_edm_zip(path)


KIND = Kind(f"a {LABEL_FILE}", _is_edm, _open, file=".zip")


def _labels(text: bytes | None, images: Sequence[str], where: str) -> tuple[Tensor, int | None]:
    if text is None:
        return class_labels(None, len(images), f"data {where}")
    what = f"data {where}, {LABEL_FILE}"
    try:
        pairs = json.loads(text)["labels"]
        labels = None if pairs is None else dict(pairs)
        unknown = sorted(labels.keys() - set(images)) if labels is not None else []
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{what}: expected {{"labels": [["name.png", 6], ...]}} or null labels') from error
    if labels is None:
        return class_labels(None, len(images), what)
    if unknown:
        raise DataError(f"{what}: labels {unknown[0]!r}, which is not one of the images; expected only their names")
    missing = [name for name in images if name not in labels]
    if missing:
        raise DataError(f"{what}: no label for {missing[0]}; expected one for each image")
    return class_labels([labels[name] for name in images], len(images), what)

"""The layout of EDM's and StyleGAN's data sets: a zip or folder of images, labelled by its dataset.json.

{"labels": [["00000/img00000000.png", 6], ...]}        or {"labels": null}

A zip without this file is read as the folder that was packed into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.base.reading import parse_json
from fdistill.data.folder import LABEL_FILE, FolderSource, open_classes
from fdistill.data.names import by_spelling, composed, shown
from fdistill.data.source import Kind, class_labels
from fdistill.data.tree import open_tree


def open_folder_or_zip(path: Path) -> FolderSource:
    """A folder or a zip file of images: labelled by its dataset.json, or by its sub-folders if it has none.

    Raises:
        DataError: a zip is damaged, there are no images, the dataset.json does not label each of them with an integer,
            or sub-folders are no classes.
    """
    tree = open_tree(path)
    listing = tree.listing()
    if LABEL_FILE not in listing.others:
        return open_classes(tree, listing)
    if not listing.images:
        raise DataError(f"data {path}: a {LABEL_FILE} but no images; expected the images that it names")
    return FolderSource(tree, listing, *_labels(tree.read_text_of(LABEL_FILE), listing.images, str(path)))


def _is_edm(where: str) -> bool:
    path = Path(where)
    if path.is_dir():
        return (path / LABEL_FILE).is_file()
    return path.is_file() and path.suffix.lower() == ".zip"


KIND = Kind(f"a {LABEL_FILE}", _is_edm, lambda where: open_folder_or_zip(Path(where)), file=".zip")


def _labels(text: bytes, images: Sequence[str], where: str) -> tuple[Tensor, int | None]:
    what = f"data {where}, {LABEL_FILE}"
    spelt = by_spelling(images)
    try:
        pairs = parse_json(text)["labels"]
        given = None if pairs is None else dict(pairs)
        labels = None if given is None else {spelt.get(n, spelt.get(composed(n), n)): i for n, i in given.items()}
        unknown = sorted(labels.keys() - set(images)) if labels is not None else []
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{what}: expected {{"labels": [["name.png", 6], ...]}} or null labels') from error
    if labels is None:
        return class_labels(None, len(images), what)
    if unknown:
        raise DataError(
            f"{what}: labels {shown(unknown[0])!r}, which is not one of the images; expected only their names"
        )
    missing = [name for name in images if name not in labels]
    if missing:
        raise DataError(f"{what}: no label for {shown(missing[0])}; expected one for each image")
    return class_labels([labels[name] for name in images], len(images), what)

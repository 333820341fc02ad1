"""A folder of image files: one sub-folder per class, or all at the top without labels.

Captions are in `photo.txt` beside `photo.jpg`, or in a metadata.jsonl or captions.jsonl at the top with lines such as
{"file_name": "photo.jpg", "text": "a photo"}, as Hugging Face's image folders have them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.data.captions import all_or_none, caption_text, decoded, json_lines, named_caption
from fdistill.data.source import IMAGE_SUFFIXES, Encoded, class_labels, is_image

_EXPECTED = f"expected images ({' '.join(sorted(IMAGE_SUFFIXES))}) in it, or one sub-folder of images per class"
_LISTS = ("metadata.jsonl", "captions.jsonl")


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

    @cached_property
    def captions(self) -> list[str] | None:
        """Captions of a .jsonl list, if there is one that has some, else of the text files; None if there are none.

        Raises:
            DataError: a caption is empty or not UTF-8 text, an image has none or two, or a caption has no image.
        """
        for name in _LISTS:
            if (self.root / name).is_file():
                listed = self._listed(name)
                if listed:
                    captions = [listed.get(file) for file in self.files]
                    return all_or_none(captions, self.item_name, [], f"data {self.root}, {name}")
        texts = {_key(file): file for file in _files(self.root, _is_text)}
        keys = [_key(file) for file in self.files]
        strays = [texts[key] for key in sorted(texts.keys() - set(keys))]
        captions = [self._beside(texts[key]) if key in texts else None for key in keys]
        return all_or_none(captions, self.item_name, strays, f"data {self.root}")

    def _listed(self, name: str) -> dict[str, str]:
        where, found = f"data {self.root}, {name}", {}
        for number, row in json_lines(self._read(name), where):
            value, file = named_caption(row), row.get("file_name")
            if value is None:
                continue
            if not isinstance(file, str):
                raise DataError(f'{where}, line {number}: a caption without "file_name"; expected the image it is of')
            file = PurePosixPath(file).as_posix()
            if file in found:
                raise DataError(f"{where}, line {number}: a second caption of {file}; expected one an image")
            found[file] = caption_text(value, f"{where}, line {number}")
        # A name is only looked up among the images below this folder: none leads out of it.
        strays = sorted(found.keys() - set(self.files))
        if strays:
            raise DataError(
                f"{where}: captions without an image in this folder: {len(strays)}, the first is of {strays[0]!r}; add "
                "the images, or remove their lines"
            )
        return found

    def _beside(self, file: str) -> str:
        where = f"data {self.root}, {file}"
        return caption_text(decoded(self._read(file), where), where)

    def _read(self, file: str) -> bytes:
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise DataError(f"data {self.root}, {file}: cannot be read ({error.strerror}); copy it again") from error


def image_files(root: Path) -> list[str]:
    """Image files anywhere below `root`, relative to it, sorted; hidden folders are left out."""
    return _files(root, is_image)


def _files(root: Path, wanted: Callable[[str], bool]) -> list[str]:
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if wanted(name)]
    return sorted(found)


def _is_text(name: str) -> bool:
    return name.lower().endswith(".txt") and not name.startswith(".")


def _key(file: str) -> str:
    return PurePosixPath(file).with_suffix("").as_posix()


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

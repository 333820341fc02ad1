"""A folder or zip file of image files: one sub-folder per class, or all at the top without labels.

Captions are in `photo.txt` beside `photo.jpg`, or in a metadata.jsonl or captions.jsonl at the top with lines such as
{"file_name": "photo.jpg", "text": "a photo"}, as Hugging Face's image folders have them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import PurePosixPath

from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.data.captions import all_or_none, caption_text, decoded, json_lines, named_caption
from fdistill.data.listing import LINKED_FOLDER, NO_IMAGE, LeftOut, Listing, class_order
from fdistill.data.names import by_spelling, composed, shown
from fdistill.data.source import IMAGE_SUFFIXES, Encoded, class_labels
from fdistill.data.tree import MOST_OF_CAPTION, Tree

#: Says what a zip file's or a folder's images are, or were made of; none of them is left out.
LABEL_FILE, MANIFEST = "dataset.json", "manifest.json"
_LISTS = ("metadata.jsonl", "captions.jsonl")
_EXPECTED = f"expected images ({' '.join(sorted(IMAGE_SUFFIXES))}) in it, or one sub-folder of images per class"


class FolderSource:
    """Image files below one folder or in one zip file.

    Args:
        listing: what lies there; its images are the items.
        labels: int64 [len(listing.images)].
        class_names: of the folders of the classes 0, 1, ...; None if labels come from elsewhere, or there are none.
    """

    def __init__(
        self,
        tree: Tree,
        listing: Listing,
        labels: Tensor,
        num_classes: int | None,
        class_names: Sequence[str] | None = None,
    ):
        self.name, self.tree, self.files = tree.name, tree, listing.images
        self.labels, self.num_classes, self.class_names = labels, num_classes, class_names
        self._texts, self._others, self._left_out = listing.texts, listing.others, listing.left_out

    def __len__(self) -> int:
        return len(self.files)

    def item_name(self, index: int) -> str:
        return shown(self.files[index])

    def encoded(self, index: int) -> Encoded:
        return self.tree.read(self.files[index])

    @property
    def others(self) -> list[str]:
        """Files that are neither images nor texts."""
        return self._others

    @property
    def left_out(self) -> LeftOut:
        """{kind: names} of what is not read; a text is a caption if an image has its name."""
        keys = {_key(file) for file in self.files}
        strays = [text for text in self._texts if _key(text) not in keys]
        # A class of images that `fdistill generate` drew has a manifest of its own.
        strays += [
            other
            for other in self._others
            if other not in (LABEL_FILE, *_LISTS) and PurePosixPath(other).name != MANIFEST
        ]
        return self._left_out | ({NO_IMAGE: sorted(strays)} if strays else {})

    @cached_property
    def captions(self) -> list[str] | None:
        """Captions of a .jsonl list, if there is one that has some, else of the text files; None if there are none.

        Raises:
            DataError: a caption is empty or not UTF-8 text, an image has none or two, or a caption has no image.
        """
        for name in _LISTS:
            if name in self._others:
                listed = self._listed(name)
                if listed:
                    captions = [listed.get(file) for file in self.files]
                    return all_or_none(captions, self.item_name, [], f"data {self.name}, {name}")
        texts = {_key(file): file for file in self._texts}
        keys = [_key(file) for file in self.files]
        strays = [shown(texts[key]) for key in sorted(texts.keys() - set(keys))]
        captions = [self._beside(texts[key]) if key in texts else None for key in keys]
        return all_or_none(captions, self.item_name, strays, f"data {self.name}")

    def _listed(self, name: str) -> dict[str, str]:
        where, found = f"data {self.name}, {name}", {}
        spelt = by_spelling(self.files)
        for number, row in json_lines(self.tree.read_text_of(name), where):
            value, file = named_caption(row), row.get("file_name")
            if value is None:
                continue
            if not isinstance(file, str):
                raise DataError(f'{where}, line {number}: a caption without "file_name"; expected the image it is of')
            file = PurePosixPath(file).as_posix()
            file = spelt.get(file, spelt.get(composed(file), file))
            if file in found:
                raise DataError(f"{where}, line {number}: a second caption of {shown(file)}; expected one an image")
            found[file] = caption_text(value, f"{where}, line {number}")
        # A name is only looked up among the images below this folder: none leads out of it.
        strays = sorted(found.keys() - set(self.files))
        if strays:
            raise DataError(
                f"{where}: captions without an image in this {self.tree.what}: {len(strays)}, the first is of "
                f"{shown(strays[0])!r}; add the images, or remove their lines"
            )
        return found

    def _beside(self, file: str) -> str:
        where = f"data {self.name}, {shown(file)}"
        return caption_text(decoded(self.tree.read_text_of(file, MOST_OF_CAPTION), where), where)


def _key(file: str) -> str:
    """photos/a.b of photos/a.b.jpg: what an image and its caption share."""
    stem, dot, suffix = file.rpartition(".")
    return composed(stem) if dot and "/" not in suffix else composed(file)


def open_classes(tree: Tree, listing: Listing) -> FolderSource:
    """Images whose classes are the sub-folders at the top; each is searched to any depth. Class ids are the places of
    the folders' names in `class_order`.

    Raises:
        DataError: no images, a sub-folder without any, or images both at the top and in sub-folders.
    """
    files, where = listing.images, f"data {shown(tree.name)}"
    flat = [name for name in files if "/" not in name]
    if not files:
        raise DataError(f"{where}: no images in this {tree.what}{_instead(listing)}; {_EXPECTED}")
    if flat and len(flat) < len(files):
        raise DataError(
            f"{where}: images both at the top ({shown(flat[0])}) and in sub-folders; expected one of the two, as only "
            "sub-folders are classes"
        )
    if flat:
        return FolderSource(tree, listing, *class_labels(None, len(files), tree.name))
    owners = [name.split("/", 1)[0] for name in files]
    empty = sorted(set(listing.folders) - set(owners))
    if empty:
        linked = empty[0] in listing.left_out.get(LINKED_FOLDER, [])
        why = "is a link, and links to folders are not followed; copy" if linked else "has no images; fill"
        raise DataError(f"{where}: the class folder {shown(empty[0])!r} {why} it or remove it")
    classes, remark = class_order(listing.folders, tree.name)
    if remark:
        warnings.warn(remark, stacklevel=2)
    ids = {name: position for position, name in enumerate(classes)}
    labels = class_labels([ids[owner] for owner in owners], len(files), tree.name)
    return FolderSource(tree, listing, *labels, classes)


def _instead(listing: Listing) -> str:
    """What lies there in place of images: arrays, or images of other formats."""
    arrays = [name for name in listing.others if name.endswith(".npy")]
    if arrays:
        return f", but arrays such as {shown(arrays[0])}, as of latents"
    kinds = [f"{len(names):,} {kind[len(names) > 1]}" for kind, names in listing.left_out.items()]
    return f", but {', '.join(kinds)}" if kinds else ""

"""WebDataset shards: uncompressed tar files in which `key.png` and `key.cls`, `key.txt` or `key.json` are one sample.

A label stands in .cls, or in .json under "label"; a caption in .txt, or in .json under "caption", "text" or "prompt".

When shards are opened, their headers are walked once to note the offset of every member; any sample is then one read.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.base.reading import parse_json, reason_of
from fdistill.data.captions import all_or_none, caption_text, decoded, named_caption
from fdistill.data.listing import (
    FORMAT,
    NO_FILE,
    LeftOut,
    files_at_top,
    images_at_top,
    in_system_folder,
    looks_like_image,
)
from fdistill.data.names import shown
from fdistill.data.source import IMAGE_SUFFIXES, Encoded, Kind, PerProcess, class_labels
from fdistill.data.tree import MOST_OF_IMAGE

_NO_CAPTION, _IN_TEXT, _IN_JSON = range(3)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_EXPECTED = {"cls": "one integer", "json": 'an object with an integer "label"'}


@dataclass
class _Sample:
    member: str
    offset: int
    size: int
    label: int | None = None
    caption: tuple[int, int, int] = (0, 0, _NO_CAPTION)


@dataclass
class _Aside:
    """What shards hold besides samples: names of captions without an image, and what is left out."""

    strays: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=dict)


class TarSource:
    """Images in tar files, read at their offsets; nothing is ever extracted.

    Args:
        members: names of the images.
        places: int64 [len(members), 3]: number of the shard, offset and size in bytes.
        labels: int64 [len(members)].
        texts: int64 [len(members), 3]: offset and size of the member with the caption, and what it is: 0 if there is
            none, 1 for .txt, 2 for .json.
        aside: what else they hold.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Path],
        members: Sequence[str],
        places: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        labels: Tensor,
        num_classes: int | None,
        texts: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        aside: _Aside,
    ):
        self.name, self.shards, self.members, self.places = name, shards, members, places
        self._texts, self._strays, self.left_out = texts, aside.strays, aside.left_out
        self.labels, self.num_classes = labels, num_classes
        self._files = [PerProcess(partial(_opened, shard)) for shard in shards]

    def __len__(self) -> int:
        return len(self.members)

    def item_name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]].name}:{shown(self.members[index])}"

    def encoded(self, index: int) -> Encoded:
        return self._read(*self.places[index].tolist())

    @cached_property
    def captions(self) -> list[str] | None:
        """One per image, read from the shards; None if there are none.

        Raises:
            DataError: a caption is empty or not UTF-8 text, an image has none, or a caption has no image.
        """
        captions = [self._caption(row) for row in range(len(self))]
        return all_or_none(captions, self.item_name, self._strays, f"data {self.name}")

    def _caption(self, row: int) -> str | None:
        offset, size, kind = self._texts[row].tolist()
        if kind == _NO_CAPTION:
            return None
        where = f"data {self.name}, caption of {self.item_name(row)}"
        content = self._read(self.places[row, 0], offset, size)
        value = named_caption(parse_json(content)) if kind == _IN_JSON else decoded(content, where)
        return caption_text(value, where)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        file = self._files[shard].get()
        file.seek(offset)
        return file.read(size)


def _opened(shard: Path) -> BinaryIO:
    return shard.open("rb")


def expand_braces(pattern: str) -> list[str]:
    """`shard-{0000..0009}.tar` -> ten names, padded like the first number; a name without braces is itself."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    middle = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rest = expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{number}{end}" for number in middle for end in rest]


def open_webdataset(where: str) -> TarSource:
    """One .tar, a folder of them (in the order of their names), or a pattern with braces.

    Raises:
        DataError: a shard is missing, is not an uncompressed tar file or is cut short, there are no images, a key has
            two, only some samples have labels, or labels are not integers.
    """
    path = Path(where)
    shards = files_at_top(path, ".tar") if path.is_dir() else [Path(name) for name in expand_braces(where)]
    if not shards:
        raise DataError(f"data {where}: no .tar files; expected shards, or a pattern like shard-{{0000..0009}}.tar")
    aside = _Aside(left_out=images_at_top(path) if path.is_dir() else {})
    samples = [(number, sample) for number, shard in enumerate(shards) for sample in _samples(shard, aside)]
    if not samples:
        raise DataError(f"data {where}: no images in these tar files; expected members such as 0001.jpg and 0001.cls")
    unlabelled = [sample for _, sample in samples if sample.label is None]
    if unlabelled and len(unlabelled) < len(samples):
        raise DataError(
            f"data {where}: {unlabelled[0].member} has no label, but other images have; expected a .cls or .json "
            'with "label" for all or none'
        )
    places = np.array([(number, sample.offset, sample.size) for number, sample in samples], dtype=np.int64)
    given = None if unlabelled else [sample.label for _, sample in samples]
    labels = class_labels(given, len(samples), f"data {where}")
    texts = np.array([sample.caption for _, sample in samples], dtype=np.int64)
    return TarSource(where, shards, [sample.member for _, sample in samples], places, *labels, texts, aside)


def _is_webdataset(where: str) -> bool:
    path = Path(where)
    if path.is_dir():
        return bool(files_at_top(path, ".tar"))
    return path.suffix.lower() == ".tar" and ("{" in path.name or path.is_file())


def _open(where: str) -> TarSource:
    return open_webdataset(str(Path(where)) if Path(where).is_dir() else where)


KIND = Kind("tar files", _is_webdataset, _open, file=".tar")


def _samples(shard: Path, aside: _Aside) -> Iterator[_Sample]:
    """The images of a shard. What else it holds is noted in `aside`."""
    samples: dict[str, _Sample] = {}
    labels: dict[str, int | None] = {}
    captions: dict[str, tuple[str, tuple[int, int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.lower().partition(".")
                key = f"{folder}/{base[: len(stem)]}"
                if not stem or member.isdir() or in_system_folder(folder):
                    continue
                if not member.isreg() or member.issparse():
                    if looks_like_image(base):
                        aside.left_out.setdefault(NO_FILE, []).append(f"{shard.name}:{member.name}")
                    continue
                if member.size > MOST_OF_IMAGE:
                    raise DataError(
                        f"data {shard}: {shown(member.name)} has {member.size:,} bytes; expected at most "
                        f"{MOST_OF_IMAGE:,}"
                    )
                if f".{extension}" in IMAGE_SUFFIXES:
                    if key in samples:
                        raise DataError(
                            f"data {shard}: {samples[key].member} and {member.name} share a key; expected one image"
                        )
                    samples[key] = _Sample(member.name, member.offset_data, member.size)
                elif extension == "txt":
                    captions[key] = member.name, (member.offset_data, member.size, _IN_TEXT)
                elif extension in _EXPECTED:
                    file = archive.extractfile(member)
                    value = _value(file.read() if file else b"", extension, f"data {shard}, {member.name}")
                    if extension == "cls" or key not in labels:
                        labels[key] = value if extension == "cls" else value.get("label")
                    if extension == "json" and named_caption(value) is not None and key not in captions:
                        captions[key] = member.name, (member.offset_data, member.size, _IN_JSON)
                elif looks_like_image(base):
                    aside.left_out.setdefault(FORMAT, []).append(f"{shard.name}:{member.name}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"data {shard}: not a whole uncompressed tar file ({reason_of(error)}); copy or unpack it again"
        ) from error
    for key, sample in samples.items():
        sample.label = labels.get(key)
        if key in captions:
            sample.caption = captions[key][1]
    aside.strays += [f"{shard.name}:{captions[key][0]}" for key in captions if key not in samples]
    return iter(samples.values())


def _value(text: bytes, extension: str, where: str) -> Any:
    """The integer of a .cls, or the object of a .json, whose "label" must be an integer if there is one."""
    try:
        value = parse_json(text)
        label = value.get("label") if extension == "json" else value
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where}: got {text[:40]!r}; expected {_EXPECTED[extension]}") from error
    if type(label) is not int and (extension, label) != ("json", None):
        raise DataError(f"{where}: label {label!r}; expected {_EXPECTED[extension]}")
    return value

"""WebDataset shards: uncompressed tar files in which `key.png` and `key.cls` or `key.json` are one sample.

Members are found by an index of offsets, made once by walking the headers, so any sample is one read away.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from fdistill.data.source import IMAGE_SUFFIXES, Encoded, PerProcess, class_labels
from fdistill.errors import DataError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_EXPECTED = {"cls": "one integer", "json": 'an object with an integer "label"'}


@dataclass
class _Sample:
    member: str
    offset: int
    size: int
    label: int | None = None


class TarSource:
    """Images in tar files, read at their offsets; nothing is ever extracted.

    Args:
        members: names of the images.
        places: int64 [len(members), 3]: number of the shard, offset and size in bytes.
        labels: int64 [len(members)].
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Path],
        members: Sequence[str],
        places: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        labels: Tensor,
        num_classes: int | None,
    ):
        self.name, self.shards, self.members, self.places = name, shards, members, places
        self.labels, self.num_classes = labels, num_classes
        self._files = [PerProcess(partial(open, shard, "rb")) for shard in shards]

    def __len__(self) -> int:
        return len(self.members)

    def item_name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]].name}:{self.members[index]}"

    def encoded(self, index: int) -> Encoded:
        shard, offset, size = self.places[index].tolist()
        file = self._files[shard].get()
        file.seek(offset)
        content: bytes = file.read(size)
        return content


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
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [Path(name) for name in expand_braces(where)]
    if not shards:
        raise DataError(f"data {where}: no .tar files; expected shards, or a pattern like shard-{{0000..0009}}.tar")
    samples = [(number, sample) for number, shard in enumerate(shards) for sample in _samples(shard)]
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
    return TarSource(where, shards, [sample.member for _, sample in samples], places, *labels)


def _samples(shard: Path) -> Iterator[_Sample]:
    samples: dict[str, _Sample] = {}
    labels: dict[str, int | None] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.lower().partition(".")
                key = f"{folder}/{base[: len(stem)]}"
                if not member.isreg() or member.issparse() or not stem:  # links and hidden files are no samples
                    continue
                if f".{extension}" in IMAGE_SUFFIXES:
                    if key in samples:
                        raise DataError(
                            f"data {shard}: {samples[key].member} and {member.name} share a key; expected one image"
                        )
                    samples[key] = _Sample(member.name, member.offset_data, member.size)
                elif extension in _EXPECTED:
                    file = archive.extractfile(member)
                    text = file.read() if file else b""
                    label = _label(text, extension, f"data {shard}, {member.name}")
                    if extension == "cls" or key not in labels:
                        labels[key] = label
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"data {shard}: not a whole uncompressed tar file ({error}); copy or unpack it again"
        ) from error
    for key, sample in samples.items():
        sample.label = labels.get(key)
    return iter(samples.values())


def _label(text: bytes, extension: str, where: str) -> int | None:
    """The integer of a .cls; of a .json its "label", None if it has none."""
    try:
        value = json.loads(text)
        label: int | None = value.get("label") if extension == "json" else value
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where}: got {text[:40]!r}; expected {_EXPECTED[extension]}") from error
    if type(label) is not int and (extension, label) != ("json", None):
        raise DataError(f"{where}: label {label!r}; expected {_EXPECTED[extension]}")
    return label

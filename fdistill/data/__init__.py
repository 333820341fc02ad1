"""Training data: one file for each kind of source, the registry of them, and batches in a repeatable order.

A new kind of source is one file, which provides a `Kind`, and one row of `STORED`.
"""

from __future__ import annotations

from pathlib import Path

from fdistill.base.errors import ConfigError, DataError, did_you_mean
from fdistill.base.reading import not_here
from fdistill.data import cifar10, digit_captions, digit_pairs, digits, edm_zip, hugging_face, npz, webdataset
from fdistill.data.loader import Batch, ImageLoader
from fdistill.data.order import Batching, EpochOrder
from fdistill.data.recipes import RECIPES
from fdistill.data.source import ArraySource, Kind, Source
from fdistill.data.teacher_samples import TEACHER_SAMPLES

__all__ = [
    "EMBEDDED",
    "RECIPES",
    "STORED",
    "TEACHER_SAMPLES",
    "Batch",
    "Batching",
    "EpochOrder",
    "ImageLoader",
    "Kind",
    "Source",
    "is_embedded",
    "is_stored",
    "load_data",
    "looks_stored",
    "open_source",
    "stored_kinds",
]

#: Data sets that come with the package. Their names win over files that have the same name.
EMBEDDED: list[Kind] = [digits.KIND, digit_captions.KIND, digit_pairs.KIND]
#: Everything else, in the order in which it is tried. A folder that two of them recognise is refused; a folder that
#: none of them recognises is a folder of images.
STORED: list[Kind] = [
    hugging_face.HUB,
    hugging_face.SAVED,
    edm_zip.KIND,
    cifar10.KIND,
    webdataset.KIND,
    hugging_face.PARQUET,
    npz.KIND,
]


def is_embedded(name: str) -> bool:
    """Whether this names a data set that comes with the package."""
    return any(kind.recognises(name) for kind in EMBEDDED)


def is_stored(where: str) -> bool:
    """Whether a row of `STORED` recognises this; a folder of images needs no row."""
    return any(kind.recognises(where) for kind in STORED)


def looks_stored(where: str) -> bool:
    """Whether a name ends like the files of a row of `STORED`, be there such a file or not."""
    return any(kind.file and where.lower().endswith(kind.file.split()[-1]) for kind in STORED)


def stored_kinds() -> str:
    """What messages say that images may be: "a folder, hf:owner/name, .zip, ... or .npz"."""
    *others, last = [kind.file for kind in STORED if kind.file]
    return f"a folder, {', '.join(others)} or {last}"


def load_data(name: str) -> ArraySource:
    """A data set that comes with the package, as arrays; raises ConfigError with the nearest name for any other."""
    for kind in EMBEDDED:
        if kind.recognises(name):
            source = kind.open(name)
            assert isinstance(source, ArraySource)
            return source
    raise ConfigError(f"data: got {name!r}; {did_you_mean(name, [*_names(), TEACHER_SAMPLES])}")


def open_source(where: str) -> Source:
    """Opens a data set, whose kind is found from its name and from what lies there.

    Args:
        where: the name of an embedded data set; hf:owner/name or hf:owner/name:split; a folder of images (one
            sub-folder per class, or flat), of EDM's layout, of tar shards, of parquet files, of `save_to_disk`, or of
            extracted CIFAR-10; a .zip, .npz, .tar, .parquet or CIFAR-10's .tar.gz; or shards as a/b-{0000..0009}.tar.

    Raises:
        DataError: there is nothing, or nothing that a row of the registry recognises; a folder holds two kinds of
            data; or the data are damaged.
    """
    if is_embedded(where):
        return load_data(where)
    found, path = [kind for kind in STORED if kind.recognises(where)], Path(where)
    if len(found) > 1:
        kinds = " and ".join(kind.name for kind in found)
        raise DataError(f"data {path}: holds {kinds}; expected one kind of data in a folder")
    if found:
        return found[0].open(where)
    if path.is_dir():
        return edm_zip.open_folder_or_zip(path)
    if not path.is_file():
        nearest = did_you_mean(where, [*_names(), TEACHER_SAMPLES])
        special = not_here(path, "")
        if special:
            raise DataError(f"data {where!r}: {special}; expected {stored_kinds()}")
        raise DataError(f"data {where!r}: no such file or folder; {nearest}, a path, or hf:owner/name")
    raise DataError(f"data {where}: a file of unknown kind; expected {stored_kinds()}")


def _names() -> list[str]:
    return [kind.name for kind in EMBEDDED]

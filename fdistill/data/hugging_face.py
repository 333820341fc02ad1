"""Data sets of the `datasets` library: from the hub or its cache, saved with `save_to_disk`, or plain parquet files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.base.files import cached_folder, read_json_object
from fdistill.data.captions import CAPTION_KEYS, all_or_none, caption_text
from fdistill.data.listing import PART, LeftOut, files_at_top, images_at_top
from fdistill.data.source import Encoded, Kind, class_labels

_IMAGE_NAMES, _LABEL_NAMES = ("image", "img", "jpg", "png"), ("label", "labels", "cls")
_CAPTION_NAMES = (*CAPTION_KEYS, "txt")  # txt: as `datasets` calls it in WebDataset shards
_TIMEOUT = 10  # seconds for the hub to answer at all


class HuggingFaceSource:
    """Rows of a `datasets.Dataset` that stores compressed images.

    Args:
        images: the data set, with no column but `column`, which is not decoded.
        labels: int64 [len(images)].
        texts: the data set, with no column but that of its captions, or None.
    """

    def __init__(self, name: str, images: Any, column: str, labels: Tensor, num_classes: int | None, texts: Any):
        self.name, self.labels, self.num_classes = name, labels, num_classes
        self._images, self._column, self._texts = images, column, texts
        self.left_out: LeftOut = {}
        self.class_names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self._images)

    def item_name(self, index: int) -> str:
        return f"row {index}"

    def encoded(self, index: int) -> Encoded:
        value = self._images[index][self._column]
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise DataError(
                f"data {self.name}: row {index} holds no image bytes but a path, and paths in a data set are not "
                "followed; write it again with its images embedded"
            )
        return content

    @cached_property
    def captions(self) -> list[str] | None:
        """From the first column there is of caption, text, prompt and txt; the first text where a row has a list.

        Raises:
            DataError: a caption is empty or not text, or only some rows have one.
        """
        if self._texts is None:
            return None
        (column,) = self._texts.column_names
        where = f"data {self.name}, column {column!r}"
        captions = [
            None if value is None else caption_text(value, f"{where}, {self.item_name(row)}")
            for row, value in enumerate(self._texts[:][column])
        ]
        return all_or_none(captions, self.item_name, [], where)


def open_hub(where: str) -> HuggingFaceSource:
    """A data set of the hub, hf:owner/name or hf:owner/name:split (train by default), downloaded if it is not cached.

    Raises:
        DataError: `datasets` is not installed, the hub cannot be reached or has no such data set or split, or its
            columns are no images and labels.
    """
    datasets = _library(where)
    from huggingface_hub import HfApi, constants

    name, _, split = where.removeprefix("hf:").partition(":")
    if name.count("/") > 1 or ".." in name or not name:
        raise DataError(f"data {where!r}: expected hf:owner/name or hf:owner/name:split")
    if not constants.HF_HUB_OFFLINE:
        try:  # `datasets` alone would repeat its attempts for half a minute
            HfApi().dataset_info(name, timeout=_TIMEOUT)
        except Exception as error:  # of the HTTP library, which differs between versions of the hub's
            raise DataError(
                f"data {where}: the hub gave no such data set ({_first_line(error)}); check the name and the network, "
                "or set HF_HUB_OFFLINE=1 to use one that is cached"
            ) from error
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # as above, and those of the builders
        offline = " while HF_HUB_OFFLINE=1, so it must be in the cache" if constants.HF_HUB_OFFLINE else ""
        raise DataError(f"data {where}: cannot be loaded{offline} ({_first_line(error)})") from error
    return _from_dataset(data, where, datasets)


def is_saved_dataset(folder: Path) -> bool:
    """True for a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_saved_dataset(folder: Path) -> HuggingFaceSource:
    """A folder of `save_to_disk`; its train split, if it has several.

    Raises:
        DataError: `datasets` is not installed, the folder is damaged or names files outside itself, there is no split
            called train, or its columns are no images and labels.
    """
    datasets = _library(str(folder))
    if not (folder / "state.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if "train" not in splits:
            raise DataError(
                f"data {folder}: no split 'train'; name the folder of one of: {', '.join(splits) or 'none'}"
            )
        folder = folder / "train"
    try:
        files = [file["filename"] for file in read_json_object(folder / "state.json")["_data_files"]]
        if any(Path(name).name != name for name in files):
            raise DataError(f"data {folder}: state.json names a file outside this folder; expected plain file names")
        data = datasets.load_from_disk(str(folder)) if files else []
    except DataError:
        raise
    except Exception as error:  # pyarrow's, of the file system, or of a state.json that holds something else
        raise DataError(f"data {folder}: cannot be loaded ({_first_line(error)}); save or copy it again") from error
    return _from_dataset(data, str(folder), datasets)


def open_parquet(path: Path) -> HuggingFaceSource:
    """One .parquet file, or those at the top of a folder; if some of them are called train*, only these.

    Their images are copied once into an Arrow file below $FDISTILL_CACHE, which is then read without loading it.

    Raises:
        DataError: `datasets` is not installed, a file is damaged, or its columns are no images and labels.
    """
    datasets = _library(str(path))
    there = [path] if path.is_file() else files_at_top(path, ".parquet")
    files = [file for file in there if file.name.startswith("train") and path.is_dir()] or there
    names = [str(file.resolve()) for file in files]
    copied = cached_folder("parquet", {name: _version(Path(name)) for name in names})
    try:
        data = datasets.Dataset.from_parquet(names, cache_dir=str(copied))
    except Exception as error:  # pyarrow's, or of the file system, wrapped by `datasets` in its own
        raise DataError(f"data {path}: cannot be read as parquet ({_first_line(error)}); copy it again") from error
    source = _from_dataset(data, str(path), datasets)
    others = [file.name for file in there if file not in files]
    source.left_out = ({PART: others} if others else {}) | (images_at_top(path) if path.is_dir() else {})
    return source


def _is_saved(where: str) -> bool:
    return Path(where).is_dir() and is_saved_dataset(Path(where))


def _is_parquet(where: str) -> bool:
    path = Path(where)
    return (
        bool(files_at_top(path, ".parquet")) if path.is_dir() else path.is_file() and path.suffix.lower() == ".parquet"
    )


HUB = Kind("a data set of the hub", lambda where: where.startswith("hf:"), open_hub, file="hf:owner/name")
SAVED = Kind("a saved data set", _is_saved, lambda where: open_saved_dataset(Path(where)))
PARQUET = Kind("parquet files", _is_parquet, lambda where: open_parquet(Path(where)), file=".parquet")


def _version(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


def _library(where: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data {where}: reading it needs the `datasets` library; install it with `pip install 'fdistill[data]'`"
        ) from error
    logging.getLogger("datasets").setLevel(logging.ERROR)
    module: ModuleType = datasets
    return module


def _from_dataset(data: Any, where: str, datasets: ModuleType) -> HuggingFaceSource:
    if len(data) == 0:
        raise DataError(f"data {where}: no rows; expected at least one image")
    kinds = data.features
    images = [name for name, kind in kinds.items() if _holds_images(name, kind, datasets)]
    column = _only(images, _IMAGE_NAMES, where, "image")
    if column is None:
        raise DataError(f"data {where}: columns {', '.join(kinds)}; expected one of images, such as 'image'")
    classes = [name for name, kind in kinds.items() if name in _LABEL_NAMES or isinstance(kind, datasets.ClassLabel)]
    label = _only(classes, _LABEL_NAMES, where, "label")
    values = None if label is None else data.select_columns([label]).with_format("numpy")[:][label]
    names = None
    labels, num_classes = class_labels(values, len(data), f"data {where}, column {label!r}")
    if label is not None and isinstance(kinds[label], datasets.ClassLabel):
        num_classes, names = kinds[label].num_classes, kinds[label].names
    encoded = data.select_columns([column])
    if isinstance(kinds[column], datasets.Image):
        encoded = encoded.cast_column(column, datasets.Image(decode=False))
    caption = next((name for name in _CAPTION_NAMES if name in kinds and name not in (column, label)), None)
    texts = None if caption is None else data.select_columns([caption]).with_format(None)
    source = HuggingFaceSource(where, encoded.with_format(None), column, labels, num_classes, texts)
    source.class_names = names
    return source


def _holds_images(name: str, kind: Any, datasets: ModuleType) -> bool:
    if isinstance(kind, datasets.Image):
        return True
    if isinstance(kind, dict):  # a parquet file that was not written by `datasets`
        return "bytes" in kind
    return name in _IMAGE_NAMES and getattr(kind, "dtype", None) in ("binary", "large_binary")


def _only(found: Sequence[str], usual: Sequence[str], where: str, what: str) -> str | None:
    """The first with a usual name, or the only one."""
    named = [name for name in usual if name in found]
    if not named and len(found) > 1:
        raise DataError(
            f"data {where}: columns {', '.join(found)} could each be the {what}; rename the one that is to {usual[0]!r}"
        )
    return next(iter([*named, *found]), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

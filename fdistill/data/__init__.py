"""Training data: one file per kind of source, and the order in which it is visited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fdistill.base.errors import ConfigError, DataError, did_you_mean
from fdistill.data.cifar10 import is_cifar10, open_cifar10
from fdistill.data.digit_captions import load_captioned_digits
from fdistill.data.digits import load_digits
from fdistill.data.edm_zip import LABEL_FILE, open_edm_folder, open_edm_zip
from fdistill.data.folder import open_folder
from fdistill.data.hugging_face import is_saved_dataset, open_hub, open_parquet, open_saved_dataset
from fdistill.data.loader import Batch, ImageLoader
from fdistill.data.npz import open_npz
from fdistill.data.order import EpochOrder
from fdistill.data.recipes import RECIPES
from fdistill.data.source import ArraySource, Source
from fdistill.data.webdataset import open_webdataset

__all__ = [
    "CAPTIONED",
    "RECIPES",
    "SOURCES",
    "TEACHER_SAMPLES",
    "Batch",
    "EpochOrder",
    "ImageLoader",
    "ImageSet",
    "Source",
    "load_data",
    "open_source",
]

SOURCES = {"digits": load_digits}
CAPTIONED = {"digit-captions": load_captioned_digits}
TEACHER_SAMPLES = "teacher-samples"  # data=teacher-samples: see data/teacher_samples.py


@dataclass(frozen=True)
class ImageSet:
    """images uint8 [N, C, H, W], labels int64 [N]."""

    images: Tensor
    labels: Tensor


def load_data(name: str) -> ImageSet:
    """An embedded data set by name; raises ConfigError with the nearest one."""
    if name not in SOURCES:
        raise ConfigError(f"data: got {name!r}; {did_you_mean(name, [*SOURCES, TEACHER_SAMPLES])}")
    return ImageSet(*SOURCES[name]())


def open_source(where: str) -> Source:
    """A data set by what is found at `where`.

    Args:
        where: the name of an embedded data set; hf:owner/name or hf:owner/name:split; a folder of images (one
            sub-folder per class, or flat), of EDM's layout, of tar shards, of parquet files, of `save_to_disk`, or of
            extracted CIFAR-10; a .zip, .npz, .tar, .parquet or CIFAR-10's .tar.gz; or shards as a/b-{0000..0009}.tar.

    Raises:
        DataError: nothing there, nothing that is known, or two kinds of data in one folder.
    """
    if where in SOURCES:
        data = load_data(where)
        return ArraySource(where, data.images, data.labels, int(data.labels.max()) + 1)
    if where in CAPTIONED:
        images, prompts = CAPTIONED[where]()
        labels = torch.tensor([prompt.digit for prompt in prompts])
        return ArraySource(where, images, labels, 10, [prompt.text for prompt in prompts])
    if where.startswith("hf:"):
        return open_hub(where)
    path = Path(where)
    if path.is_dir():
        return _open_folder(path)
    if "{" in path.name and path.suffix == ".tar":
        return open_webdataset(where)
    if not path.is_file():
        nearest = did_you_mean(where, [*SOURCES, *CAPTIONED, TEACHER_SAMPLES])
        raise DataError(f"data {where!r}: no such file or folder; {nearest}, a path, or hf:owner/name")
    if is_cifar10(path):
        return open_cifar10(path)
    if path.suffix == ".tar":
        return open_webdataset(where)
    if path.suffix == ".parquet":
        return open_parquet(path)
    if path.suffix == ".zip":
        return open_edm_zip(path)
    if path.suffix == ".npz":
        return open_npz(path)
    raise DataError(
        f"data {where}: a file of unknown kind; expected .zip, .npz, .tar, .parquet, CIFAR-10's .tar.gz, or a folder"
    )


def _open_folder(path: Path) -> Source:
    found = {
        "a saved data set": is_saved_dataset(path),
        f"a {LABEL_FILE}": (path / LABEL_FILE).is_file(),
        "CIFAR-10": is_cifar10(path),
        "tar files": any(path.glob("*.tar")),
        "parquet files": any(path.glob("*.parquet")),
    }
    kinds = [kind for kind, there in found.items() if there]
    if len(kinds) > 1:
        raise DataError(f"data {path}: holds {' and '.join(kinds)}; expected one kind of data in a folder")
    if found["a saved data set"]:
        return open_saved_dataset(path)
    if found["CIFAR-10"]:
        return open_cifar10(path)
    if found["tar files"]:
        return open_webdataset(str(path))
    if found["parquet files"]:
        return open_parquet(path)
    return open_edm_folder(path) if found[f"a {LABEL_FILE}"] else open_folder(path)

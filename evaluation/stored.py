"""The manifest.json of generated images, and arrays in files that are mapped into memory, not loaded."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdistill.base.errors import DataError
from fdistill.base.reading import ARCHIVE_ERRORS, parse_json
from fdistill.data.folder import MANIFEST, FolderSource
from fdistill.data.names import shown
from fdistill.data.npz import IMAGES, LABELS, read_array
from fdistill.data.source import ArraySource, Source, class_labels

_CHUNK, _BELOW = 1 << 24, f"/{MANIFEST}"


def read_manifest(source: Source) -> dict[str, Any]:
    """What the manifest.json in a folder or zip file says about its images; empty if there is no such file.

    Its lists go with the images in the natural order of their names, which is that of their numbers.

    Raises:
        DataError: it is damaged or of other images, or several sets of images lie there, each with its own.
    """
    if not isinstance(source, FolderSource):
        return {}
    if MANIFEST not in source.others:
        sets = sorted(name.split("/")[0] for name in source.others if name.count("/") == 1 and name.endswith(_BELOW))
        if sets:
            listed = ", ".join(shown(name) for name in sets)
            raise DataError(f"images {source.name}: its folders {listed} are sets of images; pass one of these")
        return {}
    where, count = f"{source.name}/{MANIFEST}", len(source)
    try:
        manifest = parse_json(source.tree.read_text_of(MANIFEST).decode("utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"expected a JSON object, got {type(manifest).__name__}")
    except ValueError as error:
        raise DataError(f"{where}: cannot be read as JSON ({error}); generate the images again or remove it") from error
    if manifest.get("labels") is not None:
        class_labels(manifest["labels"], count, where)
    prompts = manifest.get("prompts")
    if prompts is not None:
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise DataError(f"{where}: its prompts are not a list of texts; expected one for each image")
        if len(prompts) != count:
            raise DataError(f"{where}: {len(prompts)} prompts for {count} images; expected one for each")
    return manifest


def mapped_npz(path: Path) -> ArraySource | None:
    """Images of an uncompressed .npz, mapped into memory and not loaded: 50,000 of 256x256 are 10 GB.

    None for anything else than uint8 [N, H, W, 1 or 3], which `fdistill.data` then opens or refuses.
    """
    if path.suffix.lower() != ".npz" or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays, path.open("rb") as file:
            key = next(key for key in IMAGES if key in arrays.files)
            member = arrays.zip.getinfo(f"{key}.npy")
            file.seek(member.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # past the file name and the extra field
            if member.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(file) != (1, 0):
                return None
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or by_columns or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
                return None
            with arrays.zip.open(member) as stream:
                while stream.read(_CHUNK):
                    pass  # reading to the end checks the checksum
            images = np.memmap(file, dtype, "c", file.tell(), shape)  # "c", because torch warns of read-only memory
            labels = next((read_array(arrays, key) for key in LABELS if key in arrays.files), None)
    except (StopIteration, *ARCHIVE_ERRORS):
        return None
    found = class_labels(labels, len(images), f"data {path}")
    return ArraySource(str(path), torch.from_numpy(images.transpose(0, 3, 1, 2)), *found)

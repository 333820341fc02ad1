"""Statistics files: the mean and covariance of a reference's features, as published or as `fdistill reference` writes.

They are read as data: no pickle is executed. Which features they are of follows from the file's layout, and from its
name if the layout does not say. A plain npz of pytorch-fid looks like EDM's, although it resizes images in another way.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.images import Images, open_images
from evaluation.metrics.moments import Moments
from fdistill.base.errors import ArgumentError, CheckpointError, DataError
from fdistill.base.files import atomic_file, sha256_of_files
from fdistill.base.reading import ARCHIVE_ERRORS, parse_json, reason_of
from fdistill.formats.unpickle import load_restricted, loads_restricted

_INCEPTION, _INCEPTION_CLEAN, _DINOV2 = "inception.pool", "inception-clean.pool", "dinov2.cls"
_WIDTHS = {_INCEPTION: 2048, _INCEPTION_CLEAN: 2048, _DINOV2: 1024}
_EDM2_NAMES = {"fid": _INCEPTION, "fd_dinov2": _DINOV2}
_FORMAT = 1
_SYMMETRY = 1e-6  # largest difference between sigma and its transpose, relative to the largest entry
_EXPECTED = (
    "expected statistics of EDM, ADM or clean-fid (.npz), EDM2 (.pkl), torch-fidelity (.pt), or of `fdistill reference`"
)
_CLEAN_FID = re.compile(r".*_(clean|legacy_tensorflow|legacy_pytorch)_(?:(\w+)_)?([a-z0-9]+)_(\d+|na)$")
_TORCH_FIDELITY = re.compile(r"(.+)-(?:stat-fid|features)-(.+)$")


@dataclass(frozen=True)
class Statistics:
    """What a statistics file holds.

    Attributes:
        name: the file's name.
        sha256: hash of the file.
        kind: "EDM npz", "ADM npz", "EDM2 pickle", "torch-fidelity", "clean-fid" or "fdistill".
        moments: mean and covariance by features, as "inception.pool".
        count: number of images; None if the file does not say.
        resolution: side of the images in pixels; None if neither the file nor its name says.
        images: the 10,000 images in ADM's files, for precision, recall and KID; FID uses `moments`, which are of all.
        facts: what the provenance of scores says about it.
        rows: features of every image, float32 [N, D], by the names in `moments`; empty if the file has none.
    """

    name: str
    sha256: str
    kind: str
    moments: Mapping[str, Moments]
    count: int | None
    resolution: int | None
    images: Images | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Which images statistics are of, and how they were made.

    Attributes:
        protocol: the one that prepared the images.
        extractors: {name: {"sha256": ..., "preparation": ...}}.
        count: number of images.
        resolution: side of the images in pixels; None if they are not square.
        source, source_sha256: where the images come from, and the hash of their content.
        read: what was read of them and what was left out, as `fdistill.data.account.Account.facts`.
    """

    protocol: str
    extractors: Mapping[str, Mapping[str, Any]]
    count: int
    resolution: int | None
    source: str
    source_sha256: str | None
    read: Mapping[str, Any] | None = None


def read_statistics(path: Path) -> Statistics:
    """Reads a statistics file of any known kind.

    Raises:
        DataError: the file is missing, damaged or of an unknown kind or extractor, or no images have such statistics.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if not is_zip:
            return _read_edm2(path)
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return _read_torch_fidelity(path, pickled[0]) if pickled else _read_npz(path)
    except ARCHIVE_ERRORS as error:
        if isinstance(error, ArgumentError):
            raise DataError(f"reference {path}: {error}") from error
        raise DataError(
            f"reference {path}: cannot be read as statistics ({reason_of(error)}); check the path, or download it again"
        ) from error


def write_statistics(
    path: Path,
    moments: Mapping[str, Moments],
    origin: Origin,
    rows: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes an .npz with the arrays "inception.pool/mu" and "inception.pool/sigma" for each of `moments`,
    "inception.pool/rows" for each of `rows`, and "facts", a JSON text.

    "mu" and "sigma" repeat those of "inception.pool", because EDM's tools look for them there.

    Args:
        rows: features float32 [count, D] of every image, by the names in `moments`.

    Raises:
        OutputError: `path` cannot be written.
    """
    facts = {"format": _FORMAT, **asdict(origin)}
    if origin.read is None:
        del facts["read"]
    arrays: dict[str, np.ndarray[Any, Any]] = {"facts": np.array(json.dumps(facts))}
    for name, values in moments.items():
        mean, covariance = values.mean.numpy(), values.covariance.numpy()
        arrays |= {f"{name}/mu": mean, f"{name}/sigma": covariance}
        if name == _INCEPTION:
            arrays |= {"mu": mean, "sigma": covariance}
    arrays |= {f"{name}/rows": values.float().numpy() for name, values in (rows or {}).items()}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return path


def _read_npz(path: Path) -> Statistics:
    with np.load(path, allow_pickle=False) as arrays:
        names = arrays.files
        if "facts" in names:
            return _read_ours(path, arrays)
        if not {"mu", "sigma"} <= set(names):
            raise DataError(f"reference {path}: holds the arrays {', '.join(names) or 'none'}; {_EXPECTED}")
        mean, covariance = arrays["mu"], arrays["sigma"]
    if "arr_0" in names:
        images = open_images(path, channels=3)
        facts = {"images": f"its {len(images)} images stand for single images, its mu and sigma for all"}
        return _plain(path, "ADM npz", _INCEPTION, mean, covariance, images.read([0]).shape[-1], images, facts)
    found = _CLEAN_FID.match(path.stem.lower())
    if found is None:
        size = re.search(r"(?<!\d)(\d+)x\1(?!\d)", path.stem)
        return _plain(path, "EDM npz", _INCEPTION, mean, covariance, size and int(size[1]))
    mode, network, split, size_text = found.groups()
    if mode == "legacy_pytorch" or network is not None:
        raise DataError(
            f"reference {path}: made by clean-fid in mode {mode}{f' with {network}' if network else ''}, whose "
            "features fdistill does not compute; expected mode clean or legacy_tensorflow with Inception"
        )
    name = _INCEPTION_CLEAN if mode == "clean" else _INCEPTION
    resolution = int(size_text) if size_text.isdigit() else None
    return _plain(path, "clean-fid", name, mean, covariance, resolution, facts={"mode": mode, "split": split})


def _plain(
    path: Path,
    kind: str,
    name: str,
    mean: Any,
    covariance: Any,
    resolution: int | None,
    images: Images | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Statistics:
    moments = {name: _moments(mean, covariance, name, str(path))}
    return Statistics(path.name, sha256_of_files([path]), kind, moments, None, resolution, images, facts or {})


def _read_ours(path: Path, arrays: Any) -> Statistics:
    try:
        facts = parse_json(str(arrays["facts"]))
        count, resolution, extractors = (facts[key] for key in ("count", "resolution", "extractors"))
        numbers = type(count) is int and (resolution is None or type(resolution) is int)
        if facts["format"] != _FORMAT or not numbers or not isinstance(extractors, dict):
            raise ValueError(f"format {facts['format']}, count {count}, resolution {resolution}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"reference {path}: its facts are not as `fdistill reference` writes them ({error}); make it again"
        ) from error
    names = [name.removesuffix("/mu") for name in arrays.files if name.endswith("/mu")]
    moments = {
        name: _moments(arrays[f"{name}/mu"], arrays[f"{name}/sigma"], name, str(path), count)
        for name in names
        if f"{name}/sigma" in arrays.files
    }
    if not moments:
        raise DataError(f"reference {path}: has no statistics in it; make it again with `fdistill reference`")
    rows = {name: torch.from_numpy(arrays[f"{name}/rows"]) for name in names if f"{name}/rows" in arrays.files}
    for name, values in rows.items():
        if values.dtype != torch.float32 or values.shape != (count, moments[name].width):
            raise DataError(
                f"reference {path}: rows of {name} are {values.dtype} {list(values.shape)}; expected float32 "
                f"{[count, moments[name].width]}: make it again"
            )
    kept = {key: value for key, value in facts.items() if key not in ("format", "count", "resolution")}
    return Statistics(path.name, sha256_of_files([path]), "fdistill", moments, count, resolution, None, kept, rows)


def _read_edm2(path: Path) -> Statistics:
    try:
        content = load_restricted(path)
    except CheckpointError as error:
        raise DataError(f"reference {error}; {_EXPECTED}") from error
    found = {key: content[key] for key in _EDM2_NAMES if key in content} if isinstance(content, dict) else {}
    if not found or not all(isinstance(part, dict) and {"mu", "sigma"} <= part.keys() for part in found.values()):
        raise DataError(
            f"reference {path}: is a pickle without 'fid' or 'fd_dinov2', each with 'mu' and 'sigma'; {_EXPECTED}"
        )
    moments = {
        _EDM2_NAMES[key]: _moments(part["mu"], part["sigma"], _EDM2_NAMES[key], str(path))
        for key, part in found.items()
    }
    size = re.search(r"img(\d+)", path.stem)
    return Statistics(path.name, sha256_of_files([path]), "EDM2 pickle", moments, None, int(size[1]) if size else None)


def _read_torch_fidelity(path: Path, pickled: str) -> Statistics:
    named = _TORCH_FIDELITY.search(path.stem)
    if named is not None and not (named[1].endswith("inception-v3-compat") and named[2] == "2048"):
        raise DataError(
            f"reference {path}: its name says that it is of another extractor or layer; expected torch-fidelity's "
            "NAME-inception-v3-compat-stat-fid-2048.pt or -features-2048.pt"
        )
    try:
        content = _load_torch(path, pickled)
    except CheckpointError as error:
        raise DataError(f"reference {error}; {_EXPECTED}") from error
    if isinstance(content, dict) and {"mu", "sigma"} <= content.keys():
        return _plain(path, "torch-fidelity", _INCEPTION, content["mu"], content["sigma"], None)
    width = _WIDTHS[_INCEPTION]
    if not isinstance(content, Tensor) or content.ndim != 2 or content.shape[1] != width or len(content) < 2:
        what = list(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise DataError(f"reference {path}: holds {what}; expected 'mu' and 'sigma', or features [N, {width}]")
    rows = content.float()
    moments = {_INCEPTION: Moments.of(rows)}
    return Statistics(
        path.name, sha256_of_files([path]), "torch-fidelity", moments, len(rows), None, rows={_INCEPTION: rows}
    )


def _load_torch(path: Path, pickled: str) -> Any:
    """What torch.save wrote: tensors, by torch's own loader, or numpy arrays, which are in the pickle itself."""
    with zipfile.ZipFile(path) as archive:
        folder = pickled.removesuffix("data.pkl")
        if any(name.startswith(f"{folder}data/") for name in archive.namelist()):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # UnpicklingError, or whatever a damaged archive raises
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CheckpointError(f"{path}: holds more than tensors, or is damaged ({reason})") from error
        if archive.getinfo(pickled).compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: is compressed, which torch.save does not do")
        return loads_restricted(archive.read(pickled), str(path))


def _moments(mean: Any, covariance: Any, name: str, where: str, count: int | None = None) -> Moments:
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    what = f"reference {where}: {name}"
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f" or mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise DataError(
            f"{what}: mu {mean.dtype} {list(mean.shape)} and sigma {covariance.dtype} {list(covariance.shape)}; "
            "expected numbers [D] and [D, D]"
        )
    width = _WIDTHS.get(name, len(mean))
    if len(mean) != width:
        raise DataError(f"{what}: is of another extractor, with {len(mean)} features; expected {width}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{what}: contains NaN or infinity; make or download it again")
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > _SYMMETRY * largest:
        raise DataError(f"{what}: sigma is not symmetric and so no covariance; make or download it again")
    variances = covariance.diagonal()
    if variances.min() < 0 or variances.sum() == 0:
        raise DataError(f"{what}: variances are negative or all zero; make or download it again")
    exact_mean, exact_covariance = (torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance))
    return Moments.known(exact_mean, exact_covariance, count)

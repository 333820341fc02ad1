"""Snapshots of power-function averages, from which `posthoc_ema` reconstructs other averages.

Each is one safetensors file in float32. Half precision would do for a single snapshot, but a combination adds and
subtracts them with coefficients above 1, which magnifies rounding errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fdistill.base.errors import CheckpointError
from fdistill.base.files import atomic_file, writing
from fdistill.base.hashes import hashed_tensors, save_hashed

_FILE = re.compile(r"(\d{6,})-([0-9.e-]+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A file in a run's ema/ folder: the average of relative width `sigma_rel` after `iteration` updates."""

    path: Path
    iteration: int
    sigma_rel: float


def save_snapshot(folder: Path, iteration: int, sigma_rel: float, tensors: Mapping[str, Tensor]) -> None:
    """Writes folder/<iteration>-<sigma_rel>.safetensors.

    Raises:
        OutputError: the disk is full or cannot be written; earlier snapshots are untouched.
    """
    with atomic_file(folder / f"{iteration:06d}-{sigma_rel}.safetensors") as temporary:
        save_hashed(tensors, temporary)


def find_snapshots(folder: Path) -> list[Snapshot]:
    """A folder's snapshots, sorted by iteration, then by width; an empty list if the folder does not exist."""
    if not folder.is_dir():
        return []
    named = [(path, _FILE.fullmatch(path.name)) for path in folder.iterdir()]
    found = [Snapshot(path, int(match[1]), float(match[2])) for path, match in named if match]
    return sorted(found, key=lambda snapshot: (snapshot.iteration, snapshot.sigma_rel))


def truncate_snapshots(folder: Path, iteration: int) -> None:
    """Removes the snapshots after an iteration, because a run resumed there will write them again."""
    with writing(folder):
        for snapshot in find_snapshots(folder):
            if snapshot.iteration > iteration:
                snapshot.path.unlink()


def combine(snapshots: Sequence[Snapshot], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """The sum of coefficient times snapshot, computed in float64 and returned in float32.

    Tensors that are not floating-point are taken from the last snapshot.

    Raises:
        CheckpointError: a snapshot is truncated or damaged, or its tensors have other names than the first one's.
    """
    sums: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
        try:
            names = set()
            for name, value in hashed_tensors(snapshot.path):
                names.add(name)
                if not value.is_floating_point():
                    sums[name] = value
                elif snapshot is snapshots[0]:
                    sums[name] = coefficient * value.double()
                elif name in sums:
                    sums[name].add_(value, alpha=coefficient)
            if names != sums.keys():
                raise ValueError(f"other tensors than in {snapshots[0].path.name}")
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"snapshot {snapshot.path} cannot be read ({error}); delete that file to do without it"
            ) from error
    return {name: value.float() if value.dtype == torch.float64 else value for name, value in sums.items()}

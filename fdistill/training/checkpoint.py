"""Training checkpoints: every tensor in one safetensors file, everything else in JSON beside it. No pickle."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from fdistill.base.errors import CheckpointError
from fdistill.base.files import atomic_folder, read_json_object, writing
from fdistill.base.state_dicts import unshared

_FOLDER = re.compile(r"\d{6,}")


def save_checkpoint(folder: Path, iteration: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Writes folder/<iteration>/ and removes all but the newest `keep` checkpoints.

    Raises:
        OutputError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = folder / f"{iteration:06d}"
    with atomic_folder(path) as temporary:
        try:
            save_file(
                unshared(tensors),
                temporary / "state.safetensors",
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (temporary / "state.json").write_text(json.dumps({"iteration": iteration, **meta}, indent=2) + "\n")
    with writing(folder):
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's checkpoint folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, meta) of one checkpoint folder.

    Raises:
        CheckpointError: a file is missing, truncated or of another format.
    """
    try:
        meta = read_json_object(path / "state.json")
        meta["iteration"] = int(meta["iteration"])
        return load_file(path / "state.safetensors"), meta
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error!r}); delete that folder to resume from the one before it"
        ) from error


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors named "<parameter index>.<state name>"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; the optimiser keeps its own hyper-parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

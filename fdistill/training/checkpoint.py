"""Training checkpoints: every tensor in one safetensors file, everything else in JSON beside it. No pickle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from fdistill.base.errors import CheckpointError
from fdistill.base.files import read_json_object, replaced_folder, sha256_of_files, writing
from fdistill.base.state_dicts import take, unshared
from fdistill.training.adamw_8bit import as_state, as_tensors, is_8bit, state_like

_FOLDER = re.compile(r"\d{6,}")
_TENSORS, _META = "state.safetensors", "state.json"


def save_checkpoint(folder: Path, iteration: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Writes folder/<iteration>/ with the size and the hash of its tensors, and removes all but the newest `keep`.

    Raises:
        OutputError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = folder / f"{iteration:06d}"
    with replaced_folder(path) as temporary:
        file = temporary / _TENSORS
        save_file(unshared(tensors), file)
        files = {_TENSORS: {"bytes": file.stat().st_size, "sha256": sha256_of_files([file])}}
        text = json.dumps({"iteration": iteration, **meta, "files": files}, indent=2)
        (temporary / _META).write_text(text + "\n", encoding="utf-8")
    with writing(folder):
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's checkpoint folder, oldest first. They were written whole; see `load_checkpoint`."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, meta) of one checkpoint folder, whose files are what was written.

    A checkpoint of an earlier version has no hash; of that it is known only that the file is whole.

    Raises:
        CheckpointError: a file is missing, damaged or of another format. The message names the newest intact checkpoint
            before this one, and how to go on from there.
    """
    try:
        meta = _checked(path)
        return load_file(path / _TENSORS), meta
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}; {way_back(path)}") from error


def _checked(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint that is intact; ValueError, OSError or SafetensorError says what is not."""
    meta = read_json_object(path / _META)
    iteration, files = meta.get("iteration"), meta.pop("files", None)
    if type(iteration) is not int or iteration != int(path.name):
        raise ValueError(f"{_META} says iteration {iteration!r}, its folder {int(path.name)}")
    file = path / _TENSORS
    if files is None:
        with safe_open(file, framework="pt"):
            return meta
    try:
        size, expected = files[_TENSORS]["bytes"], files[_TENSORS]["sha256"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{_META} does not say size and hash of {_TENSORS}") from error
    if file.stat().st_size != size:
        raise ValueError(f"{_TENSORS} has {file.stat().st_size:,} bytes, of {size} that were written")
    if sha256_of_files([file]) != expected:
        raise ValueError(f"{_TENSORS} is damaged: its hash is not that of what was written")
    return meta


def newest_intact(paths: Collection[Path]) -> Path | None:
    """The last of some checkpoints, oldest first, that is what was written; None if none is."""
    for path in reversed(list(paths)):
        try:
            _checked(path)
        except (OSError, SafetensorError, ValueError):
            continue
        return path
    return None


def way_back(path: Path) -> str:
    """How to go on from the newest intact checkpoint before one that cannot be used."""
    made = checkpoints(path.parent)
    intact = newest_intact([one for one in made if int(one.name) < int(path.name)])
    if intact is None:
        return "no checkpoint before it is intact; start again in another folder"
    after = ", ".join(one.name for one in made if int(one.name) > int(intact.name))
    return (
        f"the newest intact one before it is {intact.name}: delete {after} in {path.parent} and run again with "
        f"--resume to go on from iteration {int(intact.name)}"
    )


def check_tensors(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    optimizers: Mapping[str, Optimizer],
    trained: Collection[str],
) -> None:
    """Checks that a checkpoint's tensors are those of a run, before any of them is loaded.

    Args:
        tensors: what a checkpoint holds.
        own: the run's tensors except those of optimisers, by the same names.
        optimizers: the run's, by their roles. Parameters without gradients have no state.
        trained: the roles that have been trained, so that their optimisers have a state.

    Raises:
        ValueError: a tensor is missing, has another shape or data type, or belongs to nothing in the run.
    """
    expected = dict(own)
    for role, optimizer in optimizers.items():
        prefix = f"optimizer.{role}"
        parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        indices = {name.partition(".")[0] for name in take(dict(tensors), prefix)}
        if role in trained and not indices:
            raise ValueError(f"incomplete, the state of the optimiser of {role} is missing")
        for index, parameter in parameters.items():
            if str(index) in indices:
                expected |= {
                    f"{prefix}.{index}.{name}": value for name, value in _state_like(optimizer, parameter).items()
                }
    for name, value in expected.items():
        if name not in tensors:
            raise ValueError(f"incomplete, {name} is missing")
        found = tensors[name]
        if found.shape != value.shape or found.dtype != value.dtype:
            raise ValueError(
                f"{name} is {_described(found)}, and this run has {_described(value)}; expected one of this run"
            )
    if unknown := tensors.keys() - expected.keys():
        raise ValueError(f"{min(unknown)} belongs to nothing in this run; expected one of this run")


def _state_like(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if is_8bit(optimizer):
        return state_like(parameter)
    return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors named "<parameter index>.<state name>"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in as_tensors(entry).items()}


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; the optimiser keeps its own hyper-parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    if is_8bit(optimizer):
        state = {index: as_state(entry) for index, entry in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

"""Training checkpoints: every tensor in one safetensors file, everything else in JSON beside it. No pickle."""

from __future__ import annotations

import itertools
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
from fdistill.base.files import read_json_object, replaced_folder, writing
from fdistill.base.hashes import check_files, noted_files
from fdistill.base.state_dicts import take, unshared

_FOLDER = re.compile(r"\d{6,}")
_TENSORS, _META = "state.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    iteration: int,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    keep: int,
    spared: Collection[int] = (),
) -> Path:
    """Writes folder/<iteration>/ with the size and the hash of its tensors, and removes all but the newest `keep` and
    those of the iterations in `spared`.

    Raises:
        OutputError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = folder / f"{iteration:06d}"
    with replaced_folder(path) as temporary:
        save_file(unshared(tensors), temporary / _TENSORS)
        files = noted_files(temporary, [_TENSORS])
        text = json.dumps({"iteration": iteration, **meta, "files": files}, indent=2)
        (temporary / _META).write_text(text + "\n", encoding="utf-8")
    with writing(folder):
        for old in checkpoints(folder)[:-keep]:
            if int(old.name) not in spared:
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
        CheckpointError: a file is missing, damaged or of another format.
    """
    try:
        meta = _checked(path)
        return load_file(path / _TENSORS), meta
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error


def _checked(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint that is intact; ValueError, OSError or SafetensorError says what is not."""
    meta = read_json_object(path / _META)
    iteration, files = meta.get("iteration"), meta.pop("files", None)
    if type(iteration) is not int or iteration != int(path.name):
        raise ValueError(f"{_META} says iteration {iteration!r}, its folder {int(path.name)}")
    if files is None:
        with safe_open(path / _TENSORS, framework="pt"):
            return meta
    if not isinstance(files, dict) or _TENSORS not in files:
        raise ValueError(f"{_META} does not say size and hash of {_TENSORS}")
    check_files(path, files)
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


def set_aside(folder: Path, iteration: int) -> None:
    """Gives the checkpoints after an iteration, from which a run does not go on, names that end in ".damaged"."""
    for path in checkpoints(folder):
        if int(path.name) > iteration:
            numbered = (path.with_name(f"{path.name}-{number}.damaged") for number in itertools.count(2))
            names = itertools.chain([path.with_name(f"{path.name}.damaged")], numbered)
            path.replace(next(name for name in names if not name.exists()))


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
                state = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                expected |= {f"{prefix}.{index}.{name}": value for name, value in state.items()}
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


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


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

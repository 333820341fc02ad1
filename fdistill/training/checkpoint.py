"""Training checkpoints in files of torch's distributed checkpoint: each process writes what it holds, and any number of
processes can read it. Everything else is in JSON beside them. No pickle.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from fdistill.base import rng
from fdistill.base.distributed import from_main_process, part, together
from fdistill.base.errors import CheckpointError
from fdistill.base.files import read_json_object, replaced_folder, writing
from fdistill.base.hashes import check_files, write_tensors
from fdistill.training import adamw_8bit

# What torch says of a run by one process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

_FOLDER = re.compile(r"\d{6,}")
_TENSORS, _META = "state{}.safetensors", "state.json"
_NOTED = ".json"  # ends the name of the size and hash of a file, until all files are written
_FILE_BYTES = 2**31  # of a process's files


class Chunk(NamedTuple):
    """A part of a tensor, or all of it, and where it begins in each dimension."""

    values: Tensor
    offsets: Sequence[int]

    def copy(self) -> Chunk:
        """With values in memory of their own, of the CPU."""
        return Chunk(self.values.detach().to("cpu", copy=True), self.offsets)


def own_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """What this process has to write of tensors that may be distributed; others have the rest."""
    found = {}
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            if rng.world()[0] == 0:
                found[name] = Chunk(value, [0] * value.ndim)
            continue
        local, mesh = value.to_local(), value.device_mesh
        offsets, is_first = [0] * value.ndim, True
        for place, kind, size in zip(mesh.get_coordinate() or (), value.placements, mesh.shape, strict=True):
            if isinstance(kind, Shard):
                offsets[kind.dim] = place * -(-value.shape[kind.dim] // size)
            else:
                is_first = is_first and place == 0
        if is_first and local.numel():
            found[name] = Chunk(local, offsets)
    return found


def save_checkpoint(
    folder: Path,
    iteration: int,
    chunks: Mapping[str, Chunk],
    meta: dict[str, Any],
    keep: int,
    *,
    spared: Collection[int] = (),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes folder/<iteration>/ with the size and the hash of its files, and removes all but the newest `keep` and
    those of the iterations in `spared`.

    Every process must call it.

    Args:
        chunks: from `own_chunks`, on the CPU.
        group: of all processes, over which they agree; None for the default one.

    Raises:
        OutputError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = folder / f"{iteration:06d}"
    main = rng.world()[0] == 0
    with replaced_folder(path) if main else nullcontext(path) as temporary:
        temporary = from_main_process(lambda: temporary, group)
        with writing(path):
            together(lambda: _write(chunks, temporary), group)
        if main:
            files = _named_files(temporary)
            text = json.dumps({"iteration": iteration, **meta, "files": files}, indent=2)
            (temporary / _META).write_text(text + "\n", encoding="utf-8")
            for written in (*temporary.iterdir(), temporary):
                _to_disk(written)
    if main:
        _to_disk(folder)
        with writing(folder):
            for old in checkpoints(folder)[:-keep]:
                if int(old.name) not in spared:
                    shutil.rmtree(old)
    return path


def _write(chunks: Mapping[str, Chunk], folder: Path) -> None:
    """Writes files as torch's distributed checkpoint has them, each with its size and hash beside it. torch's own
    writer takes so long for each tensor, in which training waits for the interpreter, that an iteration with a
    checkpoint of shards took up to 1.8 times as long as one without.
    """
    total = 0
    files: dict[int, dict[str, Chunk]] = {}
    for name, chunk in chunks.items():
        total += chunk.values.nbytes
        files.setdefault(total // _FILE_BYTES, {})[name] = chunk
    for number, held in files.items():
        path = folder / f"{rng.world()[0]:06d}-{number:06d}.safetensors"
        offsets = json.dumps({name: {"saved_offsets": chunk.offsets} for name, chunk in held.items()})
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": offsets}
        noted = write_tensors(path, {name: chunk.values for name, chunk in held.items()}, metadata)
        path.with_suffix(_NOTED).write_text(json.dumps(noted), encoding="utf-8")


@contextmanager
def _collected() -> Iterator[None]:
    """Raises the first of the errors that torch collects from all processes."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _named_files(folder: Path) -> dict[str, Any]:
    """Gives the files that were written their names; returns the size and hash of each."""
    made = sorted(folder.glob("*.safetensors"))
    found = {}
    for i, file in enumerate(made, 1):
        name = _TENSORS.format("" if len(made) == 1 else f"-{i:05d}-of-{len(made):05d}")
        noted = file.with_suffix(_NOTED)
        found[name] = read_json_object(noted)
        noted.unlink()
        file.rename(folder / name)
    return found


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlast a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's checkpoint folder, oldest first. They were written whole; see `load_checkpoint`."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(whole tensors on the CPU, meta) of one checkpoint folder, whose files are what was written.

    A checkpoint of an earlier version has no hash; of that it is known only that the file is whole.

    Raises:
        CheckpointError: a file is missing, damaged or of another format.
    """
    meta = check_checkpoint(path)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described_tensors(path).items()}
    read_tensors(path, tensors, alone=True)
    return tensors, meta


def check_checkpoint(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint; raises what `load_checkpoint` does."""
    try:
        return _checked(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error


def described_tensors(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of a checkpoint that is intact."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    stored: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (each.size, each.properties.dtype) for name, each in stored.items()}


def read_tensors(path: Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fills tensors, each with what this process holds of it, from a checkpoint that is intact and has them all.

    Args:
        alone: whether only this process reads, and not all of them together.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    alone = alone or rng.world()[1] == 1
    with _collected():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)


def _checked(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint that is intact; ValueError, OSError or SafetensorError says what is not."""
    meta = read_json_object(path / _META)
    iteration, files = meta.get("iteration"), meta.pop("files", None)
    if type(iteration) is not int or iteration != int(path.name):
        raise ValueError(f"{_META} says iteration {iteration!r}, its folder {int(path.name)}")
    if files is None:
        with safe_open(path / _TENSORS.format(""), framework="pt"):
            return meta
    if not isinstance(files, dict):
        raise ValueError(f"{_META} does not say size and hash of its files")
    unknown = {file.name for file in path.glob("*.safetensors")} - set(files)
    if unknown or not files:
        raise ValueError(f"{_META} does not say size and hash of {min(unknown, default=_TENSORS.format(''))}")
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
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    own: Mapping[str, Tensor],
    optimizers: Mapping[str, Optimizer],
    trained: Collection[str],
) -> None:
    """Checks that a checkpoint's tensors are those of a run, before any of them is loaded.

    Args:
        stored: shape and dtype of what a checkpoint holds.
        own: the run's tensors except those of optimisers, by the same names.
        optimizers: the run's, by their roles. Parameters without gradients have no state.
        trained: the roles that have been trained, so that their optimisers have a state.

    Raises:
        ValueError: a tensor is missing, has another shape or data type, or belongs to nothing in the run.
    """
    expected = {name: (value.shape, value.dtype) for name, value in own.items()}
    for role, optimizer in optimizers.items():
        prefix = f"optimizer.{role}"
        indices = _with_state(stored, prefix)
        if role in trained and not indices:
            raise ValueError(f"incomplete, the state of the optimiser of {role} is missing")
        for index, parameter in _parameters(optimizer).items():
            if index in indices:
                state = {name: (value.shape, value.dtype) for name, value in _state_like(optimizer, parameter).items()}
                expected |= {f"{prefix}.{index}.{name}": value for name, value in state.items()}
    for name, value in expected.items():
        if name not in stored:
            raise ValueError(f"incomplete, {name} is missing")
        if stored[name] != value:
            raise ValueError(
                f"{name} is {_described(*stored[name])}, and this run has {_described(*value)}; "
                "expected one of this run"
            )
    if unknown := stored.keys() - expected.keys():
        raise ValueError(f"{min(unknown)} belongs to nothing in this run; expected one of this run")


def _with_state(names: Collection[str], prefix: str) -> set[int]:
    """The numbers of the parameters whose state is stored under "<prefix>.<number>."."""
    inner = [name[len(prefix) + 1 :].partition(".")[0] for name in names if name.startswith(f"{prefix}.")]
    return {int(number) for number in inner if number.isdecimal()}


def _parameters(optimizer: Optimizer) -> dict[int, Tensor]:
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _state_like(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter, without values."""
    if adamw_8bit.is_8bit(optimizer):
        return adamw_8bit.state_like(parameter)
    return {
        "step": torch.empty((), device=part(parameter).device),
        "exp_avg": torch.empty_like(parameter),
        "exp_avg_sq": torch.empty_like(parameter),
    }


def prepare_optimizer(optimizer: Optimizer, names: Collection[str], prefix: str) -> None:
    """Gives AdamW a state without values for the parameters whose state is stored under "<prefix>.<number>."."""
    stored = _with_state(names, prefix)
    for index, parameter in _parameters(optimizer).items():
        if index in stored:
            optimizer.state[parameter] = _state_like(optimizer, parameter)
        else:
            optimizer.state.pop(parameter, None)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors named "<parameter index>.<state name>"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, entry in state.items()
        for name, value in adamw_8bit.as_tensors(entry).items()
    }

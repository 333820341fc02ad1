"""Damaged checkpoints, records and configs of a run, and damaged data: each ends in one line or goes on exactly, and no
checkpoint that was whole is lost.

FDISTILL_FUZZ=500 tries as many, from another seed each day, as a nightly run does; by default 8.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fdistill import distill
from fdistill.base.errors import FDistillError
from fdistill.config.reading import load_config
from fdistill.data import Batching, ImageLoader, open_source
from fdistill.training import run_folder
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints
from fdistill.training.distillation import Distillation
from support.odd_files import SPECIMENS

NIGHTLY = int(os.environ.get("FDISTILL_FUZZ", "0"))
COUNT = NIGHTLY or 8
SEED = int(os.environ.get("FDISTILL_FUZZ_SEED", time.strftime("%Y%m%d") if NIGHTLY else "0"))

tried = settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
place = st.floats(0, 1, exclude_max=True)
damages = st.tuples(st.sampled_from(["flip", "flip", "cut", "zeros", "other", "empty"]), place, st.integers(0, 7))
Damage = tuple[str, float, int]


def damaged(data: bytes, damage: Damage) -> bytes:
    """Data with a flipped bit, cut off, with zeros, with another kind of content, or none."""
    kind, where, bit = damage
    start = int(where * len(data))
    if kind == "flip" and data:
        return data[:start] + bytes([data[start] ^ 1 << bit]) + data[start + 1 :]
    if kind == "zeros":
        length = min(4096, len(data) - start)
        return data[:start] + bytes(length) + data[start + length :]
    return {"cut": data[:start], "other": b'{"iteration": 4}\n', "empty": b""}[kind]


@contextmanager
def refused_in_one_message(name: str) -> Iterator[None]:
    """A block that succeeds, or fails with an error of the project's own that names the file or its settings."""
    try:
        yield
    except FDistillError as error:
        said = str(error)
        if len(said) > 3000 or not (name in said or said.startswith(("config", "output"))):
            raise AssertionError(f"{name}: {said}") from error


def changes(teacher: Path) -> dict[str, Any]:
    quiet = {"log.every": 1, "log.samples_every": 0, "log.tracker": "none", "device": "cpu", "log.checkpoint_every": 2}
    return {"teacher": str(teacher), "batch_size": 4, "iterations": 4, **quiet}


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    distill("digits", output=folder, **changes(tiny_teacher))
    return folder


@pytest.fixture(scope="module")
def run(tiny_teacher: Path) -> Distillation:
    return build(load_config("digits", changes(tiny_teacher)), torch.device("cpu"))


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@seed(SEED)
@tried
@given(name=st.sampled_from(["state.safetensors", "state.json"]), damage=damages)
@pytest.mark.thorough
def test_a_damaged_checkpoint(made: Path, run: Distillation, tmp_path: Path, name: str, damage: Damage) -> None:
    """The one before it is taken exactly; or itself, where the damage changes nothing that counts."""
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    before = written(folder / "checkpoints" / "000002")
    victim = folder / "checkpoints" / "000004" / name
    victim.write_bytes(damaged(victim.read_bytes(), damage))
    run.iteration = 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_folder.resume_from(folder, run)
        run_folder.prepare_folder(folder, run)
    told = [warning for warning in told if "cannot be used" in str(warning.message)]
    assert run.iteration == (2 if told else 4)
    good = load_file(made / "checkpoints" / f"{run.iteration:06d}" / "state.safetensors")
    assert all(torch.equal(value, good[key]) for key, value in run.state().items())
    assert written(folder / "checkpoints" / "000002") == before
    names = [path.name for path in checkpoints(folder / "checkpoints")]
    assert names == ["000002", "000004"][: run.iteration // 2]
    assert (folder / "checkpoints" / "000004.damaged").is_dir() == bool(told)


@seed(SEED)
@tried
@given(name=st.sampled_from(["metrics.jsonl", "config.yaml", "data.json"]), damage=damages)
def test_a_damaged_file_beside_them(made: Path, run: Distillation, tmp_path: Path, name: str, damage: Damage) -> None:
    """It is refused with one message, or the run goes on; its checkpoints stay in any case."""
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    before = written(folder / "checkpoints")
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), damage))
    with refused_in_one_message(name):
        run_folder.check_output(folder, run.config, resume=True)
        run_folder.resume_from(folder, run)
        run_folder.prepare_folder(folder, run)
    assert written(folder / "checkpoints") == before


READ = sorted(
    name for name in SPECIMENS if name.endswith((".zip", ".npz", ".tar", ".gz", ".yaml")) and name != "moments.npz"
)


@seed(SEED)
@tried
@given(name=st.sampled_from(READ), damage=damages)
def test_damaged_data_and_configs(tmp_path: Path, name: str, damage: Damage) -> None:
    """A batch of it is read, or there is an error of the project's own that names the file."""
    path = tmp_path / name
    path.write_bytes(damaged(SPECIMENS[name](), damage))
    with refused_in_one_message(name):
        if path.suffix == ".yaml":
            load_config(path)
            return
        with ImageLoader(open_source(str(path)), (1, 8, 8), Batching(64, seed=0)) as loader:
            next(iter(loader))

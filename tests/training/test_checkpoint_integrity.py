"""A checkpoint that is not what was written, or not of this run, is refused before anything of it is loaded, and the
one before it is taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdistill import distill
from fdistill.base.errors import CheckpointError, OutputError
from fdistill.base.files import sha256_of_files
from fdistill.config.reading import load_config
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints, newest_intact, prepare_optimizer
from fdistill.training.distillation import Distillation
from fdistill.training.journal import read_records
from fdistill.training.run_folder import check_output, resume_from
from support.thorough import at_night

Tensors = dict[str, Tensor]


def settings(teacher: Path) -> dict[str, Any]:
    return {
        "teacher": str(teacher),
        "batch_size": 4,
        "iterations": 4,
        "device": "cpu",
        "log.every": 1,
        "log.samples_every": 0,
        "log.checkpoint_every": 2,
        "log.tracker": "none",
    }


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    distill("digits", output=folder, **settings(tiny_teacher))
    return folder


@pytest.fixture(scope="module")
def run(tiny_teacher: Path) -> Distillation:
    return build(load_config("digits", settings(tiny_teacher)), torch.device("cpu"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, with checkpoints 000002 and 000004."""
    shutil.copytree(made, tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "000004"


@pytest.fixture(autouse=True)
def _begins_anew(run: Distillation) -> Iterator[None]:
    before = {name: value.clone() for name, value in run.state().items()}
    yield
    for role, optimizer in run.optimizers.items():
        prepare_optimizer(optimizer, before, f"optimizer.{role}")
    for name, value in run.state().items():
        value.detach().copy_(before[name])
    run.iteration = 0


def load(file: Path) -> dict[str, Tensor]:
    """Copies of a file's tensors, which would change with the file."""
    return {name: value.clone() for name, value in load_file(file).items()}


def refused(folder: Path, run: Distillation, reason: str) -> None:
    """The newest is refused with a reason, and exactly the one before it is loaded."""
    with pytest.warns(UserWarning, match=rf"000004 cannot be used: .*{reason}.*; goes on from 000002, .* \.damaged$"):
        resume_from(folder, run)
    assert run.iteration == 2
    good = load_file(folder / "checkpoints" / "000002" / "state.safetensors")
    assert all(torch.equal(value, good[name]) for name, value in run.state().items())


def rewrite(checkpoint: Path, change: Callable[[Tensors], object], *, hashed: bool) -> None:
    """Changes the tensors of a checkpoint, with a hash that fits or, as in earlier versions, without any."""
    file, described = checkpoint / "state.safetensors", checkpoint / "state.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    meta = json.loads(described.read_text())
    meta["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of_files([file])}}
    if not hashed:
        del meta["files"], meta["config"]
    described.write_text(json.dumps(meta))


def flip(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def zeros(data: bytes) -> bytes:
    return data[:-8000] + bytes(4096) + data[-3904:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "hash"),
        pytest.param(zeros, "hash", marks=pytest.mark.thorough),
        (lambda data: data[:5000], "5,000 bytes, of"),
        pytest.param(lambda data: b"", "0 bytes", marks=pytest.mark.thorough),
    ],
)
def test_bytes_that_were_not_written(
    folder: Path, newest: Path, run: Distillation, damage: Callable[[bytes], bytes], reason: str
) -> None:
    file = newest / "state.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(folder, run, reason)
    assert newest_intact(checkpoints(newest.parent)) == newest.parent / "000002"


@pytest.mark.thorough
def test_resuming_takes_the_newest_that_is_intact_and_keeps_the_others(
    folder: Path, newest: Path, tiny_teacher: Path
) -> None:
    changed = {**settings(tiny_teacher), "iterations": 6, "log.keep_checkpoints": 3}
    straight = distill("digits", output=folder, resume=True, **changed)
    student = (straight / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    last = load(newest.with_name("000006") / "state.safetensors")
    newest.with_name("000004.damaged").mkdir()
    for name in ("000004", "000006"):
        (newest.parent / name / "state.safetensors").write_bytes(b"odd")
    with pytest.warns(UserWarning, match=r"000006 cannot be used: .*000004 cannot be used: .* goes on from 000002"):
        again = distill("digits", output=folder, resume=True, **changed)
    assert (again / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == student
    found = load(newest.with_name("000006") / "state.safetensors")
    assert found.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in found.items())
    names = ["000002", "000004", "000004-2.damaged", "000004.damaged", "000006", "000006.damaged"]
    assert sorted(path.name for path in newest.parent.iterdir()) == names
    for name in ("000004-2.damaged", "000006.damaged"):
        assert (newest.parent / name / "state.safetensors").read_bytes() == b"odd"
    assert [record["iteration"] for record in read_records(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_no_checkpoint_that_can_be_used(folder: Path, newest: Path, run: Distillation) -> None:
    before = {name: value.clone() for name, value in run.state().items()}
    for name in ("000002", "000004"):
        (newest.parent / name / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"000004 .* 0 bytes.*000002 .* 0 bytes.*; start again in another fold"):
        resume_from(folder, run)
    assert all(torch.equal(value, before[name]) for name, value in run.state().items())
    assert [path.name for path in checkpoints(newest.parent)] == ["000002", "000004"]


DESCRIPTIONS = [
    ("[]", "expected a JSON object, got list"),
    ("{}", "says iteration None, its folder 4"),
    ("no", "Expecting value"),
    ('{"iteration": 3}', "says iteration 3, its folder 4"),
    ('{"iteration": "4"}', "says iteration '4', its folder 4"),
    ('{"iteration": 4, "files": {}}', "does not say size and hash"),
    ('{"iteration": 4, "files": 3}', "does not say size and hash"),
    ('{"iteration": 4, "config": 3}', "got 3; expected settings by name"),
    (None, "No such file"),
]


@pytest.mark.parametrize(
    ("meta", "reason"), at_night(DESCRIPTIONS, lambda described: DESCRIPTIONS.index(described) in (1, 2, 4, 6))
)
def test_a_description_that_is_not_what_was_written(
    folder: Path, newest: Path, run: Distillation, meta: str | None, reason: str
) -> None:
    if meta is None:
        (newest / "state.json").unlink()
    else:
        (newest / "state.json").write_text(meta)
    refused(folder, run, reason)


def without(start: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]

    return change


def changed(start: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = min(name for name in tensors if name.startswith(start))
        tensors[name] = value(tensors[name]).contiguous()

    return change


WRONG: list[tuple[Callable[[Tensors], object], str]] = [
    (without("ratio.bins"), "incomplete, ratio.bins is missing"),
    (without("optimizer.generator."), "optimiser of generator is missing"),
    (without("optimizer.fake_score."), "optimiser of fake_score is missing"),
    (without("optimizer.discriminator."), "optimiser of discriminator is missing"),
    (without("optimizer.generator.3.exp_avg_sq"), r"optimizer.generator.3.exp_avg_sq is missing"),
    (changed("optimizer.fake_score.", lambda value: value[:1]), r"exp_avg is float32 \[1.*\], and this run has"),
    (changed("ema.", lambda value: value.flatten()[:3]), r"ema.\S+ is float32 \[3\], and this run has"),
    (changed("ratio.bins", lambda value: torch.ones(3)), r"ratio.bins is float32 \[3\]"),
    (changed("optimizer.generator.0.step", lambda value: torch.ones(2)), r"step is float32 \[2\]"),
    (changed("generator.", lambda value: value.half()), "is float16"),
    (lambda tensors: tensors.update({"optimizer.generator.a.step": torch.ones(())}), "belongs to nothing"),
    (lambda tensors: tensors.update({"optimizer.generator.9999.step": torch.ones(())}), "belongs to nothing"),
]


@pytest.mark.parametrize("hashed", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["hashed", "earlier"])
@pytest.mark.parametrize(
    ("change", "reason"), at_night(WRONG, lambda wrong: WRONG.index(wrong) not in (0, 1, 4, 5, 9, 10))
)
def test_tensors_of_no_run_like_this(
    folder: Path, newest: Path, run: Distillation, change: Callable[[Tensors], object], reason: str, hashed: bool
) -> None:
    rewrite(newest, change, hashed=hashed)
    refused(folder, run, reason)


@pytest.mark.parametrize(
    ("key", "value"),
    at_night(
        [("seed", 1), ("generator.beta1", 0.5), ("ratio.num_bins", 7), ("batch_size", 8)],
        lambda setting: setting[0] in ("ratio.num_bins", "batch_size"),
    ),
)
def test_a_checkpoint_of_another_run(
    folder: Path, run: Distillation, newest: Path, tiny_teacher: Path, key: str, value: float
) -> None:
    config = load_config("digits", {**settings(tiny_teacher), key: value})
    meta = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**meta, "config": config.model_dump(mode="json")}))
    refused(folder, run, f"other settings .*{key}: {value} -> ")


def test_checkpoints_that_have_been_removed_are_missed(folder: Path, run: Distillation) -> None:
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(OutputError, match=r"goes on to iteration 4, but checkpoints/ holds none"):
        check_output(folder, run.config, resume=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))  # as if killed before the first was written
    check_output(folder, run.config, resume=True)


@pytest.mark.parametrize(
    "line", [b'{"iteration": 2, "gen', b"{}", b"3", b"\xff\xfe", b"[" * 100_000, b'{"iteration": "2"}']
)
def test_a_damaged_record_is_named_and_none_is_dropped(folder: Path, run: Distillation, line: bytes) -> None:
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    damaged = b"\n".join([lines[0], line, *lines[2:], b""])
    file.write_bytes(damaged)
    with pytest.raises(OutputError, match=r"metrics.jsonl: line 2 has no measurements of the run.*remove that line"):
        check_output(folder, run.config, resume=True)
    assert file.read_bytes() == damaged
    file.write_bytes(b"\n".join([*lines, bytes(100), b""]))  # the end of what was written when the power failed
    check_output(folder, run.config, resume=True)

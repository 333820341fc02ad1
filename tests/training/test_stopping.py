"""Runs that are stopped, killed or started twice: what they leave, what they say, and how they go on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fdistill import distill
from fdistill.base.errors import FDistillError, OutputError
from fdistill.base.files import partial_path
from fdistill.base.locks import locked
from fdistill.base.signals import SIGNALS
from fdistill.commands.ending import one_message
from fdistill.training import loop
from fdistill.training.checkpoint import checkpoints
from fdistill.training.stopping import Stop

SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "iterations": 4,
    "device": "cpu",
    "log.every": 2,
    "log.samples_every": 0,
    "log.tracker": "none",
    "log.checkpoint_every": 0,
}


def run(teacher: Path, output: Path, *, resume: bool = False, **overrides: Any) -> Path:
    return distill("digits", output=output, resume=resume, **{**SETTINGS, "teacher": str(teacher), **overrides})


def iterations(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """The signals' handlers, which are put back afterwards."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sends the process a signal in the middle of an iteration of the next run."""
    iterate = loop.iterate

    def send(number: signal.Signals, at: int) -> None:
        def iterated(state: Any, *arguments: Any) -> None:
            if state.iteration == at:
                os.kill(os.getpid(), number)
            iterate(state, *arguments)

        monkeypatch.setattr(loop, "iterate", iterated)

    return send


def test_a_signal_ends_a_run_after_its_iteration_and_it_goes_on_as_if_there_had_been_none(
    tiny_teacher: Path,
    tmp_path: Path,
    signalled: Any,
    handlers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    signalled(signal.SIGTERM, 0)
    with pytest.raises(SystemExit) as ended, one_message():
        run(tiny_teacher, folder)
    assert ended.value.code == 143
    told = capfd.readouterr().err
    assert "SIGTERM: ends after this iteration, with a checkpoint; again to end at once" in told
    assert f"{folder}: stopped by SIGTERM; saved iteration 1 of 4; continue with --resume" in told
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["000001"]
    assert not (folder / "student").exists()
    assert not (folder / ".lock").exists()

    for number, at, status in ((signal.SIGUSR1, 1, 138), (signal.SIGINT, 2, 130)):
        signalled(number, at)
        with pytest.raises(SystemExit) as ended, one_message():
            run(tiny_teacher, folder, resume=True)
        assert ended.value.code == status
    assert iterations(folder) == [1, 2, 3]
    monkeypatch.undo()
    found, straight = run(tiny_teacher, folder, resume=True), run(tiny_teacher, tmp_path / "straight")
    one, two = (load_file(student / "unet" / "diffusion_pytorch_model.safetensors") for student in (found, straight))
    assert all(torch.equal(one[name], two[name]) for name in two)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)  # until another thread has handed the signal to this one


def test_a_second_signal_is_not_held_up(handlers: list[Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # test runners with several processes ignore it
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with Stop(torch.device("cpu")) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher's echo of the first
        time.sleep(1.1)
        assert stop.received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_a_thread_trains_without_handlers() -> None:
    found = []

    def work() -> None:
        with Stop(torch.device("cpu")) as stop:
            found.append(stop.received())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]


def test_other_commands_end_with_the_signals_status(
    tmp_path: Path, handlers: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    for number, status in ((signal.SIGTERM, 143), (signal.SIGUSR1, 138)):
        with pytest.raises(SystemExit) as ended, one_message():
            os.kill(os.getpid(), number)
        assert ended.value.code == status
        assert f"{number.name}: ended" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended, one_message():
        raise FDistillError("wrong")
    assert ended.value.code == 1
    assert "error: wrong" in capfd.readouterr().err


def test_a_folder_has_one_run_at_a_time(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether the other one has only begun, or has got far and this one would resume it."""
    folder, refused, iterate = tmp_path / "run", [], loop.iterate

    def iterated(state: Any, *arguments: Any) -> None:
        for resume in (False, True):
            with pytest.raises(OutputError) as caught:
                run(tiny_teacher, folder, resume=resume)
            refused.append(str(caught.value))
        iterate(state, *arguments)

    monkeypatch.setattr(loop, "iterate", iterated)
    run(tiny_teacher, folder, iterations=1)
    assert "holds a run already" in refused[0]
    assert f"output {folder}: process {os.getpid()} on " in refused[1]
    assert f"{folder}: iteration 0 to 1, 1 process on cpu" in capfd.readouterr().err
    assert iterations(folder) == [1]
    with locked(tmp_path / "new" / ".lock", "it"), pytest.raises(OutputError, match="is writing there"):
        run(tiny_teacher, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_killed_before_the_first_checkpoint(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there is taken for nothing: records and TensorBoard's steps are not there twice, leftovers go."""
    folder, iterate = tmp_path / "run", loop.iterate

    def killed(state: Any, *arguments: Any) -> None:
        if state.iteration == 3:
            raise SystemExit
        iterate(state, *arguments)

    settings = {"log.every": 1, "log.tracker": "tensorboard"}
    monkeypatch.setattr(loop, "iterate", killed)
    with pytest.raises(SystemExit):
        run(tiny_teacher, folder, **settings)
    monkeypatch.undo()
    (folder / ".lock").write_text("process 1 on a machine")
    for name in ("config.yaml", "checkpoints/000002", "student"):
        partial_path(folder / name).mkdir(parents=True)
    assert iterations(folder) == [1, 2, 3]
    run(tiny_teacher, folder, resume=True, **settings)
    assert iterations(folder) == [1, 2, 3, 4]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("generator/matching")] == [1, 2, 3, 4]
    assert [path.name for path in folder.rglob(".*")] == []

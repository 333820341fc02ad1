"""Processes that stop, die, or are fewer than were asked for: whoever waits says for whom, and not for ever."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fdistill.base import devices, heartbeat
from fdistill.base.distributed import exchanging
from fdistill.base.errors import ConfigError, ProcessError, StoppedError
from fdistill.base.heartbeat import PATIENCE, Rhythm, patience

RHYTHM = Rhythm(beat=0.02, told=0.1, limit=0.4, grace=0.1)


class EndedError(Exception):
    """In place of the end of the process."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, Callable[[], list[str]]]]:
    """The other process's end of a connection, and a function that watches until that process is not waited for."""
    mine, theirs = socket.socketpair()
    said: list[str] = []

    def end(status: int) -> None:
        assert status == 1
        raise EndedError

    monkeypatch.setattr(heartbeat, "_say", said.append)
    monkeypatch.setattr(os, "_exit", end)

    def watch() -> list[str]:
        try:
            heartbeat._watch(mine, "process 1", RHYTHM)
        except EndedError:
            said.append("status 1")
        return said

    with mine, theirs:
        yield theirs, watch


def test_a_process_that_ends_in_order_is_not_waited_for(watched: tuple[socket.socket, Callable[[], list[str]]]) -> None:
    theirs, watch = watched
    theirs.sendall(b"..")
    heartbeat._say_bye(theirs)
    assert watch() == []


def test_a_silent_process_is_named_and_waited_for_only_so_long(
    watched: tuple[socket.socket, Callable[[], list[str]]],
) -> None:
    _, watch = watched
    told, given_up, status = watch()
    assert told.startswith("waiting for process 1: it has given no sign of life for 0 s; the limit is ")
    assert given_up.startswith("error: process 1 gave no sign of life for ")
    assert status == "status 1"


def test_a_process_that_died_is_named(watched: tuple[socket.socket, Callable[[], list[str]]]) -> None:
    theirs, watch = watched
    theirs.close()
    said, status = watch()
    assert said == "error: process 1 has ended without a word; run again, a run of distill with --resume"
    assert status == "status 1"


def test_the_error_of_another_process_ends_this_one_and_is_passed_on(
    watched: tuple[socket.socket, Callable[[], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, watch = watched
    monkeypatch.setattr(heartbeat, "_connections", [theirs])
    with pytest.raises(ValueError, match="wrong"), heartbeat.telling_others():
        raise ValueError("all\nwrong")
    heartbeat._say_bye(theirs)
    further, end = socket.socketpair()
    monkeypatch.setattr(heartbeat, "_connections", [further])
    assert watch() == [
        "error: process 1 has failed: ValueError: all wrong; run again, a run of distill with --resume",
        "status 1",
    ]
    with further, end:
        assert end.recv(1000) == b"#process 1 has failed: ValueError: all wrong\n"


def test_a_signal_that_all_have_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_connections", [None])
    with pytest.raises(StoppedError), heartbeat.telling_others():
        raise StoppedError("stopped", 143)


def test_a_process_that_answers_again_is_waited_for_anew(
    watched: tuple[socket.socket, Callable[[], list[str]]],
) -> None:
    theirs, watch = watched

    def beats() -> None:
        time.sleep(0.25)
        for _ in range(20):  # longer than the limit, in all
            theirs.sendall(b".")
            time.sleep(0.03)
        theirs.sendall(b"!")

    thread = threading.Thread(target=beats)
    thread.start()
    said = watch()
    thread.join()
    assert said[1:] == ["process 1 answers again"]


def test_patience_is_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patience() == Rhythm(beat=5, told=60, limit=1200)
    monkeypatch.setenv(PATIENCE, "0.5")
    assert patience() == Rhythm(beat=3, told=15, limit=30)
    for wrong in ("0", "-1", "nan", "inf", "soon"):
        monkeypatch.setenv(PATIENCE, wrong)
        with pytest.raises(ConfigError, match=f"FDISTILL_PATIENCE: got '{wrong}'; expected minutes above 0"):
            patience()


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"WORLD_SIZE": "2"}, "2"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "8"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "several"),
    ],
)
def test_fewer_processes_than_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], count: str
) -> None:
    devices._check_alone("cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=rf"{count} were asked for, and this is one .*accelerate launch --multi_gpu"):
        devices._check_alone("cpu")


WORKER = """
import math, os, signal
import torch
from torch import nn
from fdistill.base.devices import start
from fdistill.base.distributed import from_main_process, part, wait_for_everyone
from fdistill.commands.ending import one_message
from fdistill.config.sections import OptimizerConfig
from fdistill.step import StepResult
from fdistill.training.optimise import Role
from fdistill.training.parts import Split, backward
from fdistill.training.sharding import make_mesh, shard
from fdistill.training.stopping import Stop

def refuse():
    raise ValueError("refused by the main process")

with one_message():
    state, device = start("cpu")
    with Stop(device) as stop:
        if state.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        found = [stop.received() for _ in range(3)]
    assert found == [0, 2, 2], found
    module = nn.Linear(2, 2)
    shard(module, make_mesh("ddp", device, offload=False))
    role = Role(module, torch.optim.AdamW(module.parameters(), fused=True))
    role.settle(OptimizerConfig(), 0.1)
    for spoilt in (True, False):
        before = part(module.weight.detach()).clone()
        loss = module(torch.ones(1, 2)).sum() + (math.inf if spoilt and state.process_index else 0.0)
        backward(lambda **_: StepResult(loss, {}), {}, torch.Generator(), Split(1, "fp32", [module]))
        assert bool(role.step().isfinite()) is not spoilt
        assert torch.equal(part(module.weight), before) is spoilt
    try:
        from_main_process(refuse)
    except ValueError as error:
        print(error, flush=True)
    if state.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_everyone()
"""


def test_a_collective_that_breaks_is_one_message() -> None:
    """As gloo says it where a process was killed."""
    message = r"process 0 of 1: another process has ended .*\(Connection closed by peer"
    with pytest.raises(ProcessError, match=message), exchanging():
        raise RuntimeError("Connection closed\n by peer [127.0.0.1]:1234")


@pytest.mark.thorough
def test_two_processes_of_which_one_stops(tmp_path: Path) -> None:
    """Until then they agree: on a signal that one of them has received, on skipping an update whose loss is infinite in
    one of them, and on an error of the main one.
    """
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        PATIENCE: "0.05",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said, complaint = processes[0].communicate(timeout=120)
    finally:
        processes[1].kill()
    assert processes[0].returncode == 1, complaint
    for heard in (said, processes[1].communicate()[0]):  # torch 2.8 tells of its connections before
        assert heard.endswith("refused by the main process\n")
    assert "Traceback" not in complaint
    assert re.search(rf"waiting for process 1 \(pid {processes[1].pid} on \S+\): it has given no sign", complaint)
    assert "error: process 1 (pid " in complaint


def test_a_port_in_use_is_one_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "WORLD_SIZE": "2"}
        code = "from fdistill.base.devices import start\nfrom fdistill.commands.ending import one_message\n"
        done = subprocess.run(
            [sys.executable, "-c", f"{code}with one_message():\n    start('cpu')"],
            env={**os.environ, **place, "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert "error: processes: cannot be brought together" in done.stderr
    assert "Traceback" not in done.stderr

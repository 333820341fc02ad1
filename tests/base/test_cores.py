"""Torch leaves cores to other programs that use them, and takes its threads back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
import torch

from fdistill.base import cores
from fdistill.base.cores import Reading, reading, shared_cores, threads

CPU = torch.device("cpu")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("number", "most", "others", "expected"),
    [
        (2, 2, 0.0, 2),
        (2, 2, 0.15, 2),  # what a desktop does in between
        (2, 2, 0.6, 1),  # a program that takes all it gets, beside our two threads
        (2, 2, 1.0, 1),
        (2, 2, 2.0, 1),
        (2, 1, 0.0, 1),
        (16, 8, 6.0, 8),  # cores of which each looks like two
        (16, 8, 11.0, 5),
        (16, 16, 3.3, 12),
        (2, 2, -0.1, 2),  # clocks that tick at different moments
    ],
)
def test_a_core_that_others_use_is_left_to_them(number: int, most: int, others: float, expected: int) -> None:
    own, seconds = 3.0, 2.0
    before = Reading(100.0, 50.0, 7.0)
    now = Reading(100.0 + seconds, 50.0 + own + others * seconds, 7.0 + own)
    assert threads(before, now, number, most) == expected


def test_beside_busy_programs_torch_takes_one_thread_and_then_its_own_again(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_WINDOW", 0.3)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores._cores()]
    try:
        with shared_cores(CPU) as follow:
            follow()
            assert torch.get_num_threads() == 2  # nothing was measured yet
            ends = time.monotonic() + 30
            while torch.get_num_threads() == 2 and time.monotonic() < ends:
                time.sleep(0.1)
                follow()
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        for program in busy:
            program.kill()
            program.wait()


def test_own_work_is_not_that_of_others(two_threads: None) -> None:
    before = reading()
    ends = time.monotonic() + 0.5
    while time.monotonic() < ends:
        pass
    now = reading()
    assert before is not None
    assert now is not None
    assert now.own - before.own > 0.1
    assert now.everyone - before.everyone > 0.9 * (now.own - before.own) - 0.03  # its ticks are of 10 ms


@pytest.mark.parametrize(
    ("own", "listed", "expected"),
    [({1, 2}, 4, 30.0), ({0, 1}, 2, 10.0), ({12, 13}, 2, 10.0), ({0, 2, 4}, 3, 30.0), ({2, 6}, 4, None)],
    ids=["some", "all", "numbered anew", "every second is off", "which is which is unknown"],
)
def test_only_cores_that_the_process_may_use_count(
    own: set[int], listed: int, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [SimpleNamespace(user=10.0 * core, system=0.0, idle=7.0) for core in range(listed)]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: times)
    monkeypatch.setattr(cores, "_cores", lambda: own)
    found = reading()
    assert (found and found.everyone) == expected


@pytest.mark.parametrize("reason", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "device", "system", "compiled"])
def test_threads_stay_where_the_user_says_how_many_and_elsewhere_than_on_cpus(
    reason: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_WINDOW", 0.0)
    monkeypatch.setattr(cores, "threads", lambda *_: 1)
    device = torch.device("meta") if reason == "device" else CPU
    if reason == "system":

        def unreadable(percpu: bool) -> None:
            raise PermissionError("/proc/stat")

        monkeypatch.setattr(psutil, "cpu_times", unreadable)
    elif reason.endswith("THREADS"):
        monkeypatch.setenv(reason, "2")
    with shared_cores(device, compiled=reason == "compiled") as follow:
        follow()
        assert torch.get_num_threads() == 2


def test_without_a_reason_threads_follow(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_WINDOW", 0.0)
    monkeypatch.setattr(cores, "threads", lambda *_: 1)
    with shared_cores(CPU) as follow:
        follow()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_torch_has_its_threads_again_after_an_error(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_WINDOW", 0.0)
    monkeypatch.setattr(cores, "threads", lambda *_: 1)

    def fails() -> None:
        with shared_cores(CPU) as follow:
            follow()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_num_threads() == 2

"""What a run shows: texts of a record, a terminal that stays readable, lines elsewhere, nothing on other processes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tqdm import tqdm

from fdistill.commands.cli import _show_warning
from fdistill.training.live_view import LiveView, Sight, duration, line, picture, sparkline, trend, values_of

FALLING = [0.9, 0.8, 0.85, 0.7, 0.6, 0.5]
QUICK = ["batch_size=4", "iterations=4", "log.every=1", "log.samples_every=0", "log.checkpoint_every=0"]


def test_a_sparkline_goes_from_the_least_to_the_greatest() -> None:
    assert sparkline([0.0, 2.0, 1.0, 7.0]) == "▁▃▂█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan"), 1.0, float("inf")]) == "▁"
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (FALLING, "falling"),
        (FALLING[::-1], "rising"),
        ([1.0, 2.0, 1.0, 2.0, 1.0, 2.0], "steady"),
        ([3.0] * 4, "steady"),
        ([1.18, 0.76, 0.69, 0.72, 0.63], "falling"),  # a score that falls fast at first
        ([3.0, 2.0, 1.0], ""),
        ([3.0, 2.0, 1.0, float("nan")], ""),
    ],
)
def test_a_trend_is_more_than_chance(values: list[float], word: str) -> None:
    assert trend(values) == word


def test_scores_come_first_and_only_what_records_have() -> None:
    records = [{"generator/matching": 0.5, "generator/grad_norm": 1.0}, {"generator/matching": 0.4, "eval/fid": 9.0}]
    assert values_of(records) == {"eval/fid": [9.0], "generator/matching": [0.5, 0.4]}
    assert list(values_of(records)) == ["eval/fid", "generator/matching"]


def test_a_line_says_where_the_run_is() -> None:
    sight = Sight(400, 2000, 2310.4, 72.0, {"eval/fid": [9.0], "generator/matching": FALLING}, {"an alarm": "text"})
    assert line(sight) == (
        "iteration 400 of 2,000, 2,310 images/s, 0:01:12 left; eval/fid 9; generator/matching 0.5 falling"
    )
    assert line(Sight(1, 9)) == "iteration 1 of 9"
    assert line(Sight(9, 9, 0.5, 0.0)) == "iteration 9 of 9, 0.5 images/s"
    assert [duration(seconds) for seconds in (0.4, 3725, 90_000)] == ["0:00:00", "1:02:05", "1 d 1:00:00"]


def drawn(sight: Sight, width: int, **options: bool) -> list[str]:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    console.print(picture(sight, **options))
    return [row.rstrip() for row in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_picture_has_sparklines_and_alarms_as_they_are_written() -> None:
    alarms = {"ratio collapse": "at ratio.lower [bold]or[/bold] ratio.upper"}
    sight = Sight(400, 2000, 2310.4, 72.0, {"eval/fid": [9.0], "generator/matching": FALLING}, alarms)
    rows = drawn(sight, 100)
    assert rows[0].endswith("iteration 400 of 2,000, 2,310 images/s, 0:01:12 left")
    assert re.fullmatch(r"eval/fid +9 +▁", rows[1])
    assert re.fullmatch(r"generator/matching +0.5 +█▆▇▄▃▁ +falling", rows[2])
    assert rows[3] == "ratio collapse: at ratio.lower [bold]or[/bold] ratio.upper"
    assert "▁" not in "".join(drawn(sight, 100, plain=True))
    assert all(len(row) <= 40 for row in drawn(sight, 40))


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def play(clock: Clock, during: Callable[[int], None] = lambda _: None, **options: Any) -> None:
    """A run of 20 iterations of 12 s, with a record at every second and a score at the tenth."""
    with LiveView(64, 0, 20, clock=clock, **options) as view:
        for iteration in range(1, 21):
            clock.now += 12
            during(iteration)
            record = {"iteration": iteration, "generator/matching": 1 / iteration}
            record |= {"eval/fid": 3.0} if iteration == 10 else {}
            alarms = {"saturated": "lower discriminator.lr"} if iteration >= 16 else {}
            view.after_iteration(iteration, record if iteration % 2 == 0 else None, alarms)


def test_without_a_terminal_a_line_comes_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """At first, every 30 s (after three iterations), at the score, and at the end."""
    play(Clock())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\r" not in captured.err
    assert "\x1b" not in captured.err
    lines = captured.err.splitlines()
    assert [int(text.split()[1]) for text in lines] == [1, 4, 7, 10, 13, 16, 19, 20]
    assert lines[0] == "iteration 1 of 20, 5.33 images/s, 0:03:48 left"
    assert lines[3].startswith("iteration 10 of 20, 5.33 images/s, 0:02:00 left; eval/fid 3; generator/matching 0.1")
    assert "left" not in lines[-1]


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal() as (_, shown):
        play(Clock(), main=False)
    assert shown() == [""]
    play(Clock(), main=False)
    assert capsys.readouterr().err == ""


def screen(data: str, width: int) -> list[str]:
    """The lines that a terminal shows after these bytes, also those that have scrolled away."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|[^\x1b]|\x1b", data):
        if part == "\n":
            row += 1
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            kind, number = part[-1], part[2:-1]
            assert kind in "AKmhl", part
            if kind == "A":
                row -= int(number or 1)
            elif kind == "K":
                assert number == "2"
                rows[row] = ""
        else:
            if column == width:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return [text.rstrip() for text in rows]


@contextmanager
def terminal(width: int = 80) -> Iterator[tuple[int, Callable[[], list[str]]]]:
    """Inside, standard output and error are a terminal: (its file descriptor, what it shows in the end)."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    received: list[str] = []
    with pytest.MonkeyPatch.context() as patch, os.fdopen(other, "w", encoding="utf-8") as stream:
        for name, value in (("TERM", "xterm"), ("COLUMNS", str(width)), ("LINES", "50")):
            patch.setenv(name, value)
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        yield other, lambda: screen("".join(received), width)
        stream.flush()
        os.set_blocking(main, False)
        while True:
            try:
                received.append(os.read(main, 1 << 16).decode())
            except OSError:  # nothing more
                break
    os.close(main)


def test_a_terminal_keeps_what_others_print_and_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def prints(iteration: int) -> None:
        if iteration == 4:
            tqdm.write("skipped a.png", file=sys.stderr)
        if iteration == 8:
            warnings.warn("an update was skipped", stacklevel=1)
        if iteration == 12:
            print("printed [bold] as it is")
        if iteration == 14:
            for _ in tqdm(range(3), desc="another bar", mininterval=0):
                pass

    monkeypatch.setattr(warnings, "showwarning", _show_warning)
    with warnings.catch_warnings(), terminal() as (_, shown):
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", _show_warning)
        play(Clock(), prints)
    rows = [row for row in shown() if row]
    assert [row for row in rows if row in ("skipped a.png", "printed [bold] as it is")] == rows[:3:2]
    assert rows[1] == "warning: an update was skipped"
    assert any(row.startswith("another bar: 100%") for row in rows)
    pictures = [place for place, row in enumerate(rows) if "iteration" in row]
    assert len(pictures) == 1
    last = rows[pictures[0] :]
    assert last[0].endswith("iteration 20 of 20, 5.33 images/s")
    assert re.fullmatch(r"eval/fid +3 +▁", last[1])
    assert last[2].startswith("generator/matching  0.05")
    assert last[3:] == ["saturated: lower discriminator.lr"]


@pytest.mark.thorough  # by day, what it is made of
def test_a_run_in_a_terminal_ends_with_its_picture_and_the_student(tiny_teacher: Path, tmp_path: Path) -> None:
    """The command itself, with standard output in a file: the student alone goes there."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    command = ["distill", "digits", f"teacher={tiny_teacher}", *QUICK, "device=cpu", "log.tracker=none", "--output"]
    child = subprocess.Popen(
        [sys.executable, "-m", "fdistill", *command, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=other,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(other)
    received = b""
    while True:
        try:
            received += os.read(main, 1 << 16)
        except OSError:  # the child has closed its end
            break
    os.close(main)
    out, _ = child.communicate(timeout=60)
    rows = [row for row in screen(received.decode(), 200) if row]
    assert child.returncode == 0, rows
    assert out == f"student: {tmp_path / 'run' / 'student'}\n"
    assert rows[0].startswith("data: ")
    assert [row for row in rows if "iteration 4 of 4, " in row] == rows[3:4]
    assert any(row.startswith("generator/matching ") for row in rows[4:])
    assert received.rstrip().endswith(b"\x1b[?25h"), "the cursor is there again"

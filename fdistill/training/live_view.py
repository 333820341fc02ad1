"""What a run shows while it trains: a live display in a terminal; in a log file or in CI a line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

#: Records that a sparkline and a rate are made of.
_KEPT = 20
#: Seconds between two lines of a log, and between two pictures of a terminal.
_LINES, _PICTURES = 30.0, 0.25
_BLOCKS = "▁▂▃▄▅▆▇█"
_SCORE = "eval/"
#: What is shown of a record beside its scores: the student's losses, then how its critics do.
_LOSSES = (
    *(f"generator/{name}" for name in ("matching", "implicit", "regression", "gan", "reward_loss")),
    *("fake_score/denoising", "discriminator/accuracy"),
)


@dataclass(frozen=True)
class Sight:
    """What is to be seen of a run at one moment.

    Attributes:
        iteration, iterations: done, and to do in all.
        rate: images a second of late, pauses for scores and samples included; None before it is known.
        seconds: that the rest takes at this rate; None before it is known.
        values: {quantity: its values of late, oldest first}.
        alarms: {name: sentence}, those of now.
    """

    iteration: int
    iterations: int
    rate: float | None = None
    seconds: float | None = None
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    alarms: Mapping[str, str] = field(default_factory=dict)


def sparkline(values: Sequence[float]) -> str:
    """A block for each finite value, between the least and the greatest of them: "▁▃█"."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    steps = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * steps)] for value in finite)


def trend(values: Sequence[float]) -> str:
    """ "falling", "rising" or "steady": the newer half of the values beside the older one; empty for fewer than 4.

    A difference of the halves' means counts if it is twice what chance would make. Chance is what neighbours differ by
    beyond a straight line (second differences), since a curve that falls all the time scatters widely about its mean.
    """
    half = len(values) // 2
    if half < 2 or not all(math.isfinite(value) for value in values):
        return ""
    old, new = values[:half], values[-half:]
    difference = fmean(new) - fmean(old)
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    variance = fmean(bend**2 for bend in bends) / 6  # of independent values, bends have six times theirs
    by_chance = math.sqrt(2 * variance / half)
    if abs(difference) <= max(2 * by_chance, 1e-12 * abs(fmean(old))):
        return "steady"
    return "falling" if difference < 0 else "rising"


def values_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The quantities that are shown, scores first, with their values in the records that have them."""
    scores = dict.fromkeys(name for record in records for name in record if name.startswith(_SCORE))
    found = {name: [float(record[name]) for record in records if name in record] for name in (*scores, *_LOSSES)}
    return {name: values for name, values in found.items() if values}


def duration(seconds: float) -> str:
    """ "1:02:03", and "2 d 1:02:03" from a day on."""
    days, rest = divmod(round(seconds), 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def speed(sight: Sight) -> str:
    """ "2,310 images/s, 0:01:12 left"; empty before it is known."""
    if sight.rate is None or sight.seconds is None:
        return ""
    rate = f"{sight.rate:,.0f}" if sight.rate >= 100 else f"{sight.rate:.3g}"
    return f"{rate} images/s" + (f", {duration(sight.seconds)} left" if sight.iteration < sight.iterations else "")


def line(sight: Sight) -> str:
    """One line for a log; alarms are warnings, which stand there already."""
    words = [f"iteration {sight.iteration:,} of {sight.iterations:,}", speed(sight)]
    parts = [", ".join(word for word in words if word)]
    for name, values in sight.values.items():
        direction = trend(values)
        parts.append(f"{name} {values[-1]:.4g}" + (f" {direction}" if direction else ""))
    return "; ".join(parts)


def picture(sight: Sight, *, plain: bool = False) -> RenderableType:
    """The same for a terminal, with sparklines and the alarms of now.

    Args:
        plain: whether the terminal has ASCII characters alone.
    """
    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(1, sight.iterations), completed=sight.iteration, width=30)
    words = [f"iteration {sight.iteration:,} of {sight.iterations:,}", speed(sight)]
    head.add_row(bar, Text(", ".join(word for word in words if word)))
    rows = Table.grid(padding=(0, 2))
    for name, values in sight.values.items():
        style = "bold" if name.startswith(_SCORE) else ""
        drawn = "" if plain else sparkline(values)
        rows.add_row(Text(name, style), Text(f"{values[-1]:.4g}", style), Text(drawn, "cyan"), Text(trend(values)))
    told = [Text(f"{name}: {sentence}", "yellow") for name, sentence in sight.alarms.items()]
    return Group(head, *([rows] if sight.values else []), *told)


class _Printed(FileProxy):
    """Has an encoding: a stream without one is ASCII to click, which then writes into what lies below it."""

    encoding = "utf-8"


class LiveView:
    """A context manager around training; call `after_iteration` once after each iteration.

    It reads nothing from a device: it counts iterations, and shows the records that the logbook has written.

    Args:
        batch_size: of the student's images in an iteration.
        first, iterations: the iteration at which training starts, and the last.
        main: whether this is the process that shows anything.
        clock: returns seconds.
    """

    def __init__(
        self,
        batch_size: int,
        first: int,
        iterations: int,
        *,
        main: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._batch_size, self._iteration, self._iterations = batch_size, first, iterations
        self._main, self._clock = main, clock
        self._records: deque[Mapping[str, Any]] = deque(maxlen=_KEPT)
        self._scored: deque[Mapping[str, Any]] = deque(maxlen=_KEPT)
        self._alarms: Mapping[str, str] = {}
        self._marks: deque[tuple[int, float]] = deque([(first, clock())], maxlen=_KEPT)
        self._shown_at, self._shown = -math.inf, -1
        self._console = Console(stderr=True)
        # FORCE_COLOR asks a log for colours; moving the cursor in it would make it unreadable.
        self._in_terminal = sys.stderr.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LiveView:
        self._marks[0] = (self._iteration, self._clock())
        if self._main and self._in_terminal:
            self._show()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._main and self._shown != self._iteration and self._iteration != self._marks[0][0]:
            self._show()
        self._live = None
        self._stack.close()

    def after_iteration(
        self, iteration: int, record: Mapping[str, Any] | None = None, alarms: Mapping[str, str] | None = None
    ) -> None:
        """Shows where the run is, if it is time to.

        Args:
            record: if one was written at this iteration.
            alarms: {name: sentence} of that record.
        """
        if not self._main:
            return
        self._iteration = iteration
        scored = False
        if record is not None:
            self._records.append(record)
            scored = any(name.startswith(_SCORE) for name in record)
            if scored:
                self._scored.append(record)
            self._alarms = alarms or {}
            self._marks.append((iteration, self._clock()))
        waited = self._clock() - self._shown_at
        if scored or waited >= (_PICTURES if self._in_terminal else _LINES):
            self._show()

    def _sight(self) -> Sight:
        (first, since), now = self._marks[0], self._clock()
        rate = (self._iteration - first) / (now - since) if self._iteration > first and now > since else None
        scores = {name: v for name, v in values_of(self._scored).items() if name.startswith(_SCORE)}
        return Sight(
            self._iteration,
            self._iterations,
            None if rate is None else rate * self._batch_size,
            None if rate is None else (self._iterations - self._iteration) / rate,
            {**scores, **{name: v for name, v in values_of(self._records).items() if name not in scores}},
            self._alarms,
        )

    def _show(self) -> None:
        self._shown_at, self._shown = self._clock(), self._iteration
        if not self._in_terminal:
            tqdm.write(line(self._sight()), file=sys.stderr)
            return
        seen = picture(self._sight(), plain=self._console.options.ascii_only)
        if self._live is None:
            # Without a thread of its own: a process that is forked while a thread holds a lock never gets that lock.
            live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live = self._stack.enter_context(live)
            # What others print appears above it. Standard output may lead elsewhere, and then stays as it is.
            if sys.stdout.isatty():
                self._stack.enter_context(redirect_stdout(_Printed(self._console, sys.stdout)))
            self._stack.enter_context(redirect_stderr(_Printed(self._console, sys.stderr)))
        self._live.update(seen, refresh=True)

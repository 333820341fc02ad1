"""The metrics of a run: per-sample quantities stay on the device, and are read and written every few iterations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdistill.base.distributed import gather_rows
from fdistill.base.errors import NonFiniteError, OutputError
from fdistill.base.files import atomic_file, writing
from fdistill.step import PerSample
from fdistill.training.breakdown import Applied, BrokenRunError, check_growth, first_leap

#: The bounds of the cells in which a record counts the logarithms of density ratios; below and above lies one more.
LOG_RATIO_EDGES = tuple(edge / 2 for edge in range(-6, 7))
_LOG_RATIO = "generator/log_ratio"
LOG_RATIO_COUNTS = f"{_LOG_RATIO}_counts"

#: Quantities whose spread matters as much as their mean.
_SPREAD = ("generator/h", "generator/weight")


class _Update(NamedTuple):
    """The logs of an update's parts, the norms of its roles' gradients, and where in the run it was."""

    parts: Sequence[Mapping[str, PerSample]]
    norms: Mapping[str, Tensor]
    place: str


class Journal:
    """Collects the logs of updates, and averages them into a record now and then.

    Nothing is read from the device before `record`. Every process must call `add` and `record`, and all of them get the
    same record.

    Args:
        bin_index: levels t [N] -> noise bins [N], for the discriminator's accuracy per bin.
        num_bins: number of bins.
        max_skipped: how many updates of a role in a row may have a gradient that is not finite.
    """

    def __init__(self, bin_index: Callable[[Tensor], Tensor], num_bins: int, max_skipped: int):
        self._bin_index, self._num_bins, self._max_skipped = bin_index, num_bins, max_skipped
        self._updates: list[_Update] = []
        self._applied: list[Applied] = []
        self._in_a_row: dict[str, int] = {}
        self._first: dict[str, str] = {}

    @property
    def stuck(self) -> bool:
        """Whether, at the last record, the last update of a role had been skipped."""
        return any(self._in_a_row.values())

    def add(
        self,
        parts: Sequence[Mapping[str, PerSample]],
        grad_norms: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
        place: str = "an update",
    ) -> None:
        """Adds the logs of one update.

        Args:
            parts: the quantities of each of its parts, named "role/quantity".
            grad_norms: the gradient norm of each role it updated, 0-d; the update of a role whose norm is not finite
                was skipped.
            weights: the norms of each such role's weights before and after the update, [2].
            place: where in the run it is, for messages.
        """
        self._updates.append(_Update(parts, grad_norms, place))
        self._applied.append({role: (grad_norms[role], norms) for role, norms in (weights or {}).items()})

    def record(self) -> dict[str, Any]:
        """Returns the means since the last record over the updates that were applied, and clears the collected logs.

        If there were others, "role/skipped" is their number, and "skipped" says of each role how its first came about.

        Raises:
            NonFiniteError: too many updates of a role in a row were skipped, a quantity of one that was applied is not
                finite, or a role's weights grew out of range. The message names the role, quantity, noise level and
                place of the first, because one broken role soon breaks the others; its `leap` is the first update that
                was out of range.
        """
        updates, self._updates = self._updates, []
        applied, self._applied = self._applied, []
        norms = [norm for update in updates for norm in update.norms.values()]
        # An offloaded role's are on the CPU.
        values = iter(torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else [])
        read = [{role: next(values) for role in update.norms} for update in updates]
        try:
            check_growth(_weights(applied))
            skipped = self._skipped(updates, read)
            samples = _collected([_applied_quantities(*pair) for pair in zip(updates, read, strict=True)])
            for name, (value, t) in samples.items():
                if (problem := _problem(name, value, t)) is not None:
                    raise NonFiniteError(f"{problem} in an update that was applied")
        except NonFiniteError as error:
            raise BrokenRunError(str(error), first_leap(applied)) from error

        record: dict[str, Any] = {}
        for name, (value, _) in samples.items():
            record[name] = value.mean().item()
            if name in _SPREAD:
                record[f"{name}_min"], record[f"{name}_max"] = value.min().item(), value.max().item()
        for role in dict.fromkeys(role for norms in read for role in norms):
            finite = [norms[role] for norms in read if math.isfinite(norms.get(role, math.nan))]
            record.update({f"{role}/grad_norm": sum(finite) / len(finite)} if finite else {})
        return {**record, **self._accuracy(samples), **self._log_ratios(samples), **skipped}

    def _skipped(self, updates: Sequence[_Update], read: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What a record says of skipped updates; raises NonFiniteError if there were too many in a row."""
        counts: dict[str, int] = {}
        causes: dict[str, str] = {}
        for update, norms in zip(updates, read, strict=True):
            for role, norm in norms.items():
                if math.isfinite(norm):
                    self._in_a_row[role] = 0
                    continue
                if not self._in_a_row.get(role):
                    self._first[role] = f"{_cause(update, role, norm)} at {update.place}"
                self._in_a_row[role] = self._in_a_row.get(role, 0) + 1
                counts[role] = counts.get(role, 0) + 1
                causes.setdefault(role, self._first[role])
                if self._in_a_row[role] >= self._max_skipped:
                    raise NonFiniteError(
                        f"{self._first[role]}; from there on all {self._in_a_row[role]} updates of {role} were skipped"
                    )
        said = {f"{role}/skipped": count for role, count in counts.items()}
        return {**said, "skipped": list(causes.values())} if counts else {}

    def _accuracy(self, samples: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
        pairs = [
            samples[name] for name in ("discriminator/accuracy_real", "discriminator/accuracy_fake") if name in samples
        ]
        if not pairs:
            return {}
        correct, t = (torch.cat(column) for column in zip(*pairs, strict=True))
        index = self._bin_index(t)
        hits = torch.zeros(self._num_bins).index_add_(0, index, correct)
        count = torch.zeros(self._num_bins).index_add_(0, index, torch.ones_like(correct))
        per_bin = [h / n if n else None for h, n in zip(hits.tolist(), count.tolist(), strict=True)]
        return {"discriminator/accuracy": correct.mean().item(), "discriminator/accuracy_per_bin": per_bin}

    def _log_ratios(self, samples: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """How many log ratios of each noise bin lie in each cell of `LOG_RATIO_EDGES`."""
        if _LOG_RATIO not in samples:
            return {}
        value, t = samples[_LOG_RATIO]
        cells = len(LOG_RATIO_EDGES) + 1
        index = self._bin_index(t) * cells + torch.bucketize(value, torch.tensor(LOG_RATIO_EDGES))
        counts = torch.bincount(index, minlength=self._num_bins * cells).reshape(self._num_bins, cells)
        return {LOG_RATIO_COUNTS: counts.tolist()}


def _applied_quantities(update: _Update, norms: Mapping[str, float]) -> list[Mapping[str, PerSample]]:
    """The logs of an update's parts without the quantities of roles whose update was skipped."""
    skipped = {role for role, norm in norms.items() if not math.isfinite(norm)}

    def is_left_out(name: str) -> bool:
        role = name.partition("/")[0]
        return role in skipped or (role not in norms and bool(skipped))

    return [{name: entry for name, entry in part.items() if not is_left_out(name)} for part in update.parts]


def _collected(updates: Sequence[Sequence[Mapping[str, PerSample]]]) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (values, levels) of all updates, their parts and processes}, on the CPU."""
    samples: dict[str, list[PerSample]] = {}
    for part in (part for parts in updates for part in parts):
        for name, entry in part.items():
            samples.setdefault(name, []).append(entry)
    return {
        name: (
            gather_rows(torch.cat([entry.value for entry in entries])).cpu(),
            gather_rows(torch.cat([entry.t for entry in entries])).cpu(),
        )
        for name, entries in samples.items()
    }


def _weights(applied: Sequence[Applied]) -> dict[str, Tensor]:
    """{role: norms of its weights before and after each update, [N, 2]}, on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for step in applied:
        for role, (_, weights) in step.items():
            found.setdefault(role, []).append(weights)
    return {role: torch.stack(norms).cpu() for role, norms in found.items()}


def _problem(name: str, value: Tensor, t: Tensor) -> str | None:
    """What is wrong with the values [N] of a quantity at levels t [N]; None if all are finite."""
    bad = (~torch.isfinite(value)).nonzero()
    if not len(bad):
        return None
    role, _, quantity = name.partition("/")
    return (
        f"{role}: {quantity} became {value[bad[0, 0]].item()} at noise level t = {t[bad[0, 0]].item():.4g} "
        f"({len(bad)} of {len(value)} samples)"
    )


def _cause(update: _Update, role: str, norm: float) -> str:
    """Why an update of a role was skipped: the first of its quantities that is not finite, or else its gradient."""
    problems = (_problem(name, *values) for name, values in _collected([update.parts]).items())
    return next(
        (problem for problem in problems if problem is not None),
        f"{role}: the gradient became {norm} while its losses were finite",
    )


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to a JSON-lines file."""
    with writing(path), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that is incomplete, as after a kill, is left out.

    Raises:
        OutputError: an earlier line is no record; nothing is left out for its sake.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records = []
    for number, line in numbered:
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number != numbered[-1][0]:
            raise OutputError(
                f"{path}: line {number} has no measurements of the run: {line[:40]!r} stands there, so the "
                "file was damaged; remove that line and run again"
            )
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("iteration")) is int else None


def truncate_records(path: Path, iteration: int) -> None:
    """Removes the records after an iteration, so that a resumed run writes none of them twice."""
    if not path.is_file():
        return
    kept: Iterable[str] = [json.dumps(record) for record in read_records(path) if record["iteration"] <= iteration]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's finite numbers, for trackers; entry i of a list `name` becomes `name/i`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, entry in entries:
            if isinstance(entry, (int, float)) and math.isfinite(entry):
                flat[name if index is None else f"{name}/{index}"] = float(entry)
    return flat

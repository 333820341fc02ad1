"""The metrics of a run: per-sample quantities stay on the device, and are read and written every few iterations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.base.distributed import gather_rows
from fdistill.base.errors import NonFiniteError, OutputError
from fdistill.base.files import atomic_file, writing
from fdistill.step import PerSample
from fdistill.training.breakdown import Applied, BrokenRunError, check_growth, first_leap

#: Quantities whose spread matters as much as their mean.
_SPREAD = ("generator/h", "generator/weight")


class Journal:
    """Collects the logs of steps, and averages them into a record now and then.

    Nothing is read from the device before `record`. Every process must call `add` and `record`, and all of them get the
    same record.

    Args:
        bin_index: levels t [N] -> noise bins [N], for the discriminator's accuracy per bin.
        num_bins: number of bins.
    """

    def __init__(self, bin_index: Callable[[Tensor], Tensor], num_bins: int):
        self._bin_index, self._num_bins = bin_index, num_bins
        self._steps: list[tuple[Mapping[str, PerSample], Mapping[str, Tensor]]] = []
        self._applied: list[Applied] = []

    def add(
        self,
        logs: Mapping[str, PerSample],
        grad_norms: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds the logs of one step.

        Args:
            logs: its quantities, named "role/quantity".
            grad_norms: the gradient norm of each role it updated, 0-d.
            weights: the norms of each such role's weights before and after the update, [2].
        """
        self._steps.append((logs, grad_norms))
        self._applied.append({role: (grad_norms[role], norms) for role, norms in (weights or {}).items()})

    def record(self) -> dict[str, Any]:
        """Returns the means since the last record, and clears the collected logs.

        Raises:
            NonFiniteError: a quantity was NaN or infinite, or a role's weights grew out of range. The message names the
                role, quantity and noise level of the first step with such a value, because one broken role soon breaks
                the others; its `leap` is the first update that was out of range.
        """
        steps, self._steps = self._steps, []
        applied, self._applied = self._applied, []
        samples, norms = _collected(steps)
        values = [value for value, _ in samples.values()] + list(norms.values())
        try:
            if not all(bool(torch.isfinite(value).all()) for value in values):
                for step in steps:
                    _refuse_non_finite(*_collected([step]))
            check_growth(_weights(applied))
        except NonFiniteError as error:
            raise BrokenRunError(str(error), first_leap(applied)) from error

        record: dict[str, Any] = {}
        for name, (value, _) in samples.items():
            record[name] = value.mean().item()
            if name in _SPREAD:
                record[f"{name}_min"], record[f"{name}_max"] = value.min().item(), value.max().item()
        for role, of_role in norms.items():
            record[f"{role}/grad_norm"] = of_role.mean().item()
        record.update(self._accuracy(samples))
        return record

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


def _collected(
    steps: Sequence[tuple[Mapping[str, PerSample], Mapping[str, Tensor]]],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """({name: (values, levels) of all steps and processes}, {role: gradient norms}), on the CPU."""
    samples: dict[str, list[PerSample]] = {}
    norms: dict[str, list[Tensor]] = {}
    for logs, grad_norms in steps:
        for name, entry in logs.items():
            samples.setdefault(name, []).append(entry)
        for role, norm in grad_norms.items():
            norms.setdefault(role, []).append(norm)
    gathered = {
        name: (
            gather_rows(torch.cat([entry.value for entry in entries])).cpu(),
            gather_rows(torch.cat([entry.t for entry in entries])).cpu(),
        )
        for name, entries in samples.items()
    }
    return gathered, {role: torch.stack(values).cpu() for role, values in norms.items()}


def _weights(applied: Sequence[Applied]) -> dict[str, Tensor]:
    """{role: norms of its weights before and after each update, [N, 2]}, on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for step in applied:
        for role, (_, weights) in step.items():
            found.setdefault(role, []).append(weights)
    return {role: torch.stack(norms).cpu() for role, norms in found.items()}


def _refuse_non_finite(samples: Mapping[str, tuple[Tensor, Tensor]], norms: Mapping[str, Tensor]) -> None:
    for name, (value, t) in samples.items():
        bad = (~torch.isfinite(value)).nonzero()
        if len(bad):
            role, _, quantity = name.partition("/")
            raise NonFiniteError(
                f"{role}: {quantity} became {value[bad[0, 0]].item()} at noise level t = {t[bad[0, 0]].item():.4g} "
                f"({len(bad)} of {len(value)} samples)"
            )
    for role, of_role in norms.items():
        if not bool(torch.isfinite(of_role).all()):
            raise NonFiniteError(f"{role}: the gradient became {of_role.max().item()} while its losses were finite")


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

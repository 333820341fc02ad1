"""A plan as text for the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdistill.base.files import atomic_file
from fdistill.planning.plan import Plan, Scaled
from fdistill.planning.rates import Seconds

_SHOWN = 8  # remedies


def as_json(plan: Plan) -> str:
    """Every number of a plan, in bytes and seconds."""
    device = plan.device
    facts: dict[str, Any] = {
        "config": plan.config.model_dump(mode="json"),
        "hardware": asdict(plan.hardware),
        "samples_per_gpu": plan.samples,
        "placement": asdict(plan.placed),
        "whole": [asdict(row) for row in plan.found.rows],
        "per_gpu": {**asdict(device), "held": device.held, "total": device.total},
        "disk": [asdict(each) for each in plan.disk],
        "flops_per_iteration": plan.flops,
        "bytes_sent": [asdict(each) for each in plan.sent],
        "seconds": _times(plan.time),
        "table": [_as_dict(row) for row in plan.table],
        "remedies": None if plan.remedies is None else [asdict(remedy) for remedy in plan.remedies],
        "notes": plan.notes,
    }
    return json.dumps(facts, indent=1) + "\n"


def _times(time: Seconds | None) -> dict[str, float] | None:
    return None if time is None else {**asdict(time), "overlapped": time.overlapped, "apart": time.apart}


def _as_dict(row: Scaled) -> dict[str, Any]:
    return {
        "gpus": row.gpus,
        "samples_per_gpu": row.samples,
        "bytes": None if row.device is None else row.device.total,
        "seconds": _times(row.time),
        "seconds_of_a_batch_that_grows": _times(row.grown),
    }


def write(plan: Plan, path: Path) -> None:
    """Writes `as_json`; raises OutputError if it cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_text(as_json(plan), encoding="utf-8")


def as_text(plan: Plan) -> str:
    """A plan for the terminal."""
    parts = [_head(plan), _memory(plan), _verdict(plan), _disk(plan), _traffic(plan), _table(plan), _notes(plan)]
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    rates, placed, config = plan.hardware.rates, plan.placed, plan.config
    between = f", {rates.network:g} GB/s between machines of {placed.machine}" if placed.gpus > 1 else ""
    speed = f"{rates.tflops:g} TFLOP/s a GPU" if rates.seconds is None else f"{rates.seconds:g} s measured on one GPU"
    return (
        f"{config.teacher} by {config.method}: {placed.gpus} GPU{'s' * (placed.gpus > 1)} with {plan.samples} samples "
        f"each, parallel={placed.parallel}, precision={config.precision}\n"
        f"Assumed: {speed}, {rates.link:g} GB/s within a machine{between}. Counted, not measured."
    )


def _memory(plan: Plan) -> str:
    unit, device = _Unit.of(plan.device.total), plan.device
    lines = [[f"on one GPU, {unit.name}", "trained, M", "weights", "gradients", "optimiser", "EMA", "sum"]]
    trained = {row.role: row.trained for row in plan.found.rows}
    for row in device.rows:
        sizes = (row.weights, row.gradients, row.optimizer, row.averages, row.total)
        lines.append([row.role, f"{trained[row.role] / 1e6:.1f}", *map(unit, sizes)])

    def line(text: str, size: int) -> None:
        lines.append([text, "", "", "", "", "", unit(size)])

    for name, activations in device.activations.items():
        update = plan.found.updates[name]
        parts = f", {update.parts} parts" if update.parts > 1 else ""
        line(f"{name}'s update: activations of {update.samples} samples{parts}", activations)
    if device.gathered:
        line("blocks that are gathered while they run", device.gathered)
    peak = max(device.activations, key=lambda name: device.gradients[name] + device.activations[name])
    line(f"peak, in the {peak}'s update, with {unit(device.gradients[peak])} of gradients", device.total)
    if device.host:
        line("in the CPU's memory, for each GPU", device.host)
    return _aligned(lines)


@dataclass(frozen=True)
class _Unit:
    """Writes bytes in GB, or in MB where a GB is too much."""

    name: str
    size: float
    digits: int

    @classmethod
    def of(cls, size: float) -> _Unit:
        return cls("GB", 1e9, 2) if size >= 1e9 else cls("MB", 1e6, 1)

    def __call__(self, size: float) -> str:
        return f"{size / self.size:.{self.digits}f}"


def _verdict(plan: Plan) -> str:
    memory = plan.hardware.memory
    if memory is None:
        return ""
    if plan.remedies is None:
        return f"Fits {memory / 1e9:g} GB."
    if not plan.remedies:
        return f"Does not fit {memory / 1e9:g} GB, and no setting that was tried makes it fit."
    unit = _Unit.of(plan.device.total)
    lines = [f"Does not fit {memory / 1e9:g} GB. With these settings it does ({unit.name}):"]
    lines += [f"  {unit(remedy.bytes)}  {' '.join(remedy.settings)}" for remedy in plan.remedies[:_SHOWN]]
    left = len(plan.remedies) - _SHOWN
    return "\n".join(lines + ([f"  and {left} more, which --json lists"] if left > 0 else []))


def _disk(plan: Plan) -> str:
    lines = [["on disk", "each, MB", "count", "GB"]]
    for each in plan.disk:
        count, total = ("?", "?") if each.count is None else (f"{each.count:,}", f"{each.each * each.count / 1e9:.3g}")
        lines.append([each.what, f"{each.each / 1e6:.3g}", count, total])
    return _aligned(lines)


def _traffic(plan: Plan) -> str:
    kind = "" if plan.hardware.rates.seconds is None else " (time is as measured)"
    operations = f"An iteration takes {plan.flops / 1e12:.3g} TFLOP on each GPU{kind}."
    if plan.placed.gpus == 1:
        return operations
    lines = [["a GPU sends in an iteration, GB", "within its machine", "between machines"]]
    lines += [[each.role, f"{each.inside / 1e9:.3g}", f"{each.between / 1e9:.3g}"] for each in plan.sent]
    return f"{operations}\n{_aligned(lines)}"


def _table(plan: Plan) -> str:
    unit = _Unit.of(plan.device.total)
    head = ["GPUs", "samples each", f"{unit.name} each", "computes, s", "communicates, s", "iteration, s", "speed-up"]
    lines = [[*head, "batch grows, s", "efficiency"]]
    first = next(row.time for row in plan.table if row.gpus == 1)
    alone = plan.table[0].grown
    assert first is not None
    for row in plan.table:
        cells = ["-"] * 6
        if row.samples is not None and row.device is not None and row.time is not None:
            times = (row.time.compute, row.time.communication)
            speed = f"{first.apart / row.time.apart:.1f} - {first.overlapped / row.time.overlapped:.1f}"
            cells = [str(row.samples), unit(row.device.total), *map(_s, times), _range(row.time), speed]
        share = f"{100 * alone.apart / row.grown.apart:.0f} - {100 * alone.overlapped / row.grown.overlapped:.0f} %"
        lines.append([str(row.gpus), *cells, _range(row.grown), share])
    text = (
        "The config's batch divided among more GPUs, and beside it a batch that grows with them. Two numbers: "
        "communication\nbeside computation wherever it can be, and one after the other."
    )
    return f"{text}\n{_aligned(lines, right=True)}"


def _notes(plan: Plan) -> str:
    notes = [f"note: {note}" for note in plan.notes]
    levels = plan.config.student_level
    if isinstance(levels, list) and len(levels) > 1:
        notes.append(f"note: the student takes all of its {len(levels)} steps; on average a run takes fewer")
    notes.append(
        "Not counted: CUDA's context and the allocator's unused blocks (1 to 2 GB), workspaces of convolutions,\n"
        "latencies of links."
    )
    return "\n".join(notes)


def _s(seconds: float) -> str:
    return f"{seconds:.3g}"


def _range(time: Seconds) -> str:
    fast, slow = _s(time.overlapped), _s(time.apart)
    return fast if fast == slow else f"{fast} - {slow}"


def _aligned(lines: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Columns of equal width: the first one to the left, unless `right`, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number or right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )

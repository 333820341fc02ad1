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
from fdistill.student_kinds import STUDENT_KINDS

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
    many = placed.gpus > 1
    where = f"{placed.gpus} GPUs, parallel={placed.parallel}" if many else "1 GPU"
    speed = f"{rates.tflops:g} TFLOP/s of a GPU (--tflops)"
    if rates.seconds is not None:
        speed = f"{_duration(rates.seconds)} for an iteration of one GPU (--seconds-per-iteration)"
    return (
        f"Plan for {config.teacher} by {config.method} on {where}: {plan.samples} samples{' on each' * many} in an "
        f"update, precision={config.precision}.\n"
        f"Nothing was trained. Memory is counted. Times assume {speed}, {rates.link:g} GB/s between GPUs\n"
        f"of a machine (--link), {rates.network:g} GB/s to other machines (--network), and {placed.machine} GPUs in a "
        "machine (--gpus-per-machine)."
    )


def _memory(plan: Plan) -> str:
    unit, device = _Unit.of(plan.device.total), plan.device
    trained = {row.role: row.trained for row in plan.found.rows}
    lines = [[f"on {'each' if plan.placed.gpus > 1 else 'the'} GPU, {unit.name}", "trained, millions"]]
    lines[0] += ["weights", "optimiser", "EMA", "all the time", "gradients"]
    for row in device.rows:
        sizes = (row.weights, row.optimizer, row.averages, row.total - row.gradients, row.gradients)
        lines.append([row.role, f"{trained[row.role] / 1e6:.1f}", *map(unit, sizes)])

    def line(text: str, size: int) -> None:
        lines.append([text, "", "", "", "", unit(size), ""])

    line("all roles", device.held)
    for name, activations in device.activations.items():
        update = plan.found.updates[name]
        parts = f" in {update.parts} parts of" if update.parts > 1 else ","
        gradients = device.gradients[name]
        also = f" and {unit(gradients)} of gradients" if float(unit(gradients)) else ""
        line(f"+ {name}'s update{parts} {update.samples} samples: activations{also}", gradients + activations)
    if device.gathered:
        line("+ blocks, copied whole while they run", device.gathered)
    peak = max(device.activations, key=lambda name: device.gradients[name] + device.activations[name])
    line(f"= most at one time, in the {peak}'s update", device.total)
    if device.host:
        elsewhere = ", ".join(role for role in trained if role not in {row.role for row in device.rows})
        line(f"in the CPU's memory instead, for each GPU: {elsewhere}", device.host)
    line("in the CPU's memory, for each GPU, while a checkpoint is written", device.saved)
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
    unit = _Unit.of(plan.device.total)
    asked = f"{unit(plan.device.total)} {unit.name} of {unit(memory)} {unit.name}"
    if plan.remedies is None:
        return f"It fits: {asked}."
    if not plan.remedies:
        return f"It does not fit: {asked}. No setting that was tried makes it fit."
    lines = [f"It does not fit: {asked}. With the settings of any one of these lines it does ({unit.name} with them):"]
    lines += [f"  {unit(remedy.bytes)}  {' '.join(remedy.settings)}" for remedy in plan.remedies[:_SHOWN]]
    left = len(plan.remedies) - _SHOWN
    return "\n".join(lines + ([f"  and {left} more, which --json lists"] if left > 0 else []))


def _disk(plan: Plan) -> str:
    lines = [["on disk", "MB each", "how many", "GB"]]
    for each in plan.disk:
        count, total = ("?", "?") if each.count is None else (f"{each.count:,}", _three(each.each * each.count / 1e9))
        lines.append([each.what, _three(each.each / 1e6), count, total])
    unknown = any(each.count is None for each in plan.disk)
    return _aligned(lines) + "\n?: not known before the data are there" * unknown


def _traffic(plan: Plan) -> str:
    fast, slow, count = plan.time.overlapped, plan.time.apart, plan.config.iterations
    as_in = " as in the last stage" if plan.config.stages else ""
    took = (
        f"An iteration takes {_between(_duration(fast), _duration(slow))}, and {count:,} of them{as_in} "
        f"{_between(_duration(count * fast), _duration(count * slow))}: {_three(plan.flops / 1e12)} TFLOP on each GPU."
    )
    if plan.placed.gpus == 1:
        return took
    unit = _Unit.of(max(each.inside + each.between for each in plan.sent))
    lines = [[f"a GPU sends in an iteration, {unit.name}", "within its machine", "to other machines"]]
    lines += [[each.role, unit(each.inside), unit(each.between)] for each in plan.sent]
    return f"{took}\n{_aligned(lines)}"


def _table(plan: Plan) -> str:
    unit = _Unit.of(plan.device.total)
    first = next(row.time for row in plan.table if row.gpus == 1)
    alone = plan.table[0].grown
    assert first is not None
    name, factor = ("s", 1.0) if first.apart >= 1 else ("ms", 1e3)

    def range_of(time: Seconds) -> str:
        return _between(f"{factor * time.overlapped:.3g}", f"{factor * time.apart:.3g}")

    head = ["GPUs", "samples each", f"{unit.name} each", f"computing, {name}", f"sending, {name}"]
    lines = [[*head, f"iteration, {name}", "speed-up", "|", f"iteration, {name}", "efficiency"]]
    for row in plan.table:
        cells = ["-"] * 6
        if row.samples is not None and row.device is not None and row.time is not None:
            times = (row.time.compute, row.time.communication)
            speed = _between(f"{first.apart / row.time.apart:.1f}", f"{first.overlapped / row.time.overlapped:.1f}")
            seconds = [f"{factor * time:.3g}" for time in times]
            cells = [str(row.samples), unit(row.device.total), *seconds, range_of(row.time), speed]
        share = _between(
            f"{100 * alone.apart / row.grown.apart:.0f}", f"{100 * alone.overlapped / row.grown.overlapped:.0f}"
        )
        lines.append([str(row.gpus), *cells, "|", range_of(row.grown), f"{share} %"])
    batch = plan.config.batch_size
    text = (
        f"The same run on 1 to 512 GPUs. Left of the bar, its batch of {batch} is divided among them; right of it, the "
        f"batch grows,\nwith {plan.samples} samples on each. Of two numbers, one is for sending beside computing, the "
        "other for one after the other."
    )
    uneven = any(row.samples is None for row in plan.table)
    return f"{text}\n{_aligned(lines, right=True)}" + f"\n-: {batch} samples do not divide among so many" * uneven


def _notes(plan: Plan) -> str:
    notes = [f"note: {note}" for note in plan.notes]
    config = plan.config
    steps = config.student.steps or len(config.student_levels or ()) or 1
    if steps > 1 and STUDENT_KINDS[config.student.generator].steps and not config.diversity.weight:
        notes.append(f"note: the student takes all of its {steps} steps; on average a run takes fewer")
    notes.append(
        "Not counted: CUDA's context and the allocator's unused blocks (1 to 2 GB), workspaces of convolutions,\n"
        "latencies of links, and the time to start kernels, for which small networks mostly wait."
    )
    return "\n".join(notes)


def _duration(seconds: float) -> str:
    """In a unit that suits it, with three digits."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _three(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} - {high}"


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

"""Results of one protocol as one table and one figure; `fdistill compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any

from evaluation.comparison.entries import Comparison, Entry, comparison_of, read_entry
from evaluation.comparison.table import markdown_table, text_table
from fdistill.base.errors import ArgumentError, OutputError
from fdistill.base.files import atomic_folder, claimed_folder, read_json_object

__all__ = ["compare"]


def compare(
    inputs: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    protocol: str | None = None,
    **options: Any,
) -> Comparison:
    """Puts results side by side. `evaluation.comparison` shows them as a table or a figure.

    A score is not ranked if it was measured in another way than most scores of its metric: on another number of
    samples, against another reference, by another extractor. The table says so.

    Args:
        inputs: two or more. Each is a JSON file that `evaluate` wrote, or anything that `evaluate` takes, which is then
            measured.
        output: a folder for comparison.md, comparison.json and comparison.png, which must be empty or not exist.
        names: names of the rows, one for each input; by default the parts of its path that tell it from the others.
        metrics: columns of the table, of which the first is drawn. By default all metrics of the results; the first is
            then the first one that all results have.
        protocol: protocol of all results; by default that of the JSON files, or "digits" if there are none.
        options: further arguments of `evaluation.evaluate.evaluate` for the inputs that must be measured. num_steps is
            read by teachers and pipelines alone, sampler and seeds by everything that makes images.

    Raises:
        ArgumentError: fewer than two inputs, one of them twice, JSON files that are not results or of another protocol,
            results without a common metric, or options that nothing reads.
        OutputError: the folder cannot be written.
        FDistillError: whatever `evaluate` raises, after all JSON files have been read.
    """
    if len(inputs) < 2:
        raise ArgumentError(f"inputs: got {len(inputs)}; expected two or more results, students or folders to compare")
    called = short_names(inputs) if names is None else _checked(names, inputs)
    entries: dict[str, Entry] = {}
    for name, where in zip(called, inputs, strict=True):
        if _is_result(where):
            entries[name] = read_entry(name, str(where), _read(Path(where)))
            own = entries[name].protocol
            if protocol not in (None, own):
                raise ArgumentError(
                    f"{where}: was measured by protocol {own!r}, and is to be compared by {protocol!r}; "
                    "scores of two protocols cannot be compared, so evaluate all by one"
                )
            protocol = own
    if options and len(entries) == len(inputs):
        raise ArgumentError(f"{', '.join(options)}: every input is a result already, so nothing is left to evaluate")
    left = {name: where for name, where in zip(called, inputs, strict=True) if name not in entries}
    with ExitStack() as stack:
        folder = None if output is None else _claimed(Path(output), stack, bool(left), options.get("device", "auto"))
        if left:
            from evaluation.evaluate import evaluate
            from evaluation.protocols import get_protocol

            protocol = protocol or "digits"
            if metrics is not None:
                groups = {metric.name: metric.outputs for metric in get_protocol(protocol).metrics}
                metrics = [output for name in metrics for output in groups.get(name, (name,))]
            read = {name: _options_read(where, options) for name, where in left.items()}
            for option in options:
                if not any(option in names for names in read.values()):
                    raise ArgumentError(f"{option}: none of {', '.join(left)} takes it; leave it out")
            for name, where in left.items():
                result = evaluate(where, protocol=protocol, metrics=metrics, **read[name])
                entries[name] = read_entry(name, str(where), result)
        comparison = comparison_of([entries[name] for name in called], metrics)
        if folder is not None:
            _write(comparison, folder)
    return comparison


def _claimed(output: Path, stack: ExitStack, measures: bool, device: str) -> Path | None:
    """The claimed folder in the process that writes; None in the others, of which there may be some to measure."""
    if not measures:
        return stack.enter_context(claimed_folder(output))
    from fdistill.base.devices import start
    from fdistill.base.distributed import from_main_process

    state, _ = start(device)
    folder = from_main_process(lambda: stack.enter_context(claimed_folder(output)))
    return folder if state.is_main_process else None


def _options_read(where: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that apply to an input: none of `Sampling` to finished images, only some to students.

    Raises:
        FDistillError: the input does not exist. So this is found before anything is measured.
    """
    from dataclasses import fields

    from evaluation.evaluate import holds_images
    from fdistill.adapters.checkpoint import resolve_checkpoint
    from fdistill.generation.sampling import Sampling
    from fdistill.students.folder import fetch_student

    if holds_images(where):
        unread = ["seeds", *(field.name for field in fields(Sampling))]
    elif fetch_student(where) is not None:
        unread = ["num_steps", "guidance_scale", "guidance_teacher", "negative_prompt", "resolution"]
    else:
        resolve_checkpoint(where)
        unread = []
    return {key: value for key, value in options.items() if key not in unread}


def _write(comparison: Comparison, folder: Path) -> None:
    from evaluation.comparison.figure import draw

    record = {
        "protocol": comparison.protocol,
        "metrics": comparison.metrics,
        "results": [
            {"name": entry.name, "not_ranked": dict(entry.unlike), **entry.result} for entry in comparison.entries
        ],
    }
    try:
        with atomic_folder(folder) as temporary:
            (temporary / "comparison.md").write_text(markdown_table(comparison), encoding="utf-8")
            (temporary / "comparison.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            draw(comparison).savefig(temporary / "comparison.png", dpi=200)
    except OutputError as error:
        raise OutputError(f"{error}; what was compared:\n{text_table(comparison)}") from error


def _is_result(where: str | Path) -> bool:
    return Path(where).suffix == ".json"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(path)
    except OSError as error:
        raise ArgumentError(
            f"{path}: cannot be read ({error.strerror or error}); expected a file of `fdistill evaluate --output`"
        ) from error
    except ValueError as error:
        raise ArgumentError(f"{path}: {error}; expected a file of `fdistill evaluate --output`") from error


def short_names(inputs: Sequence[str | Path]) -> list[str]:
    """The last part of each path without .json, preceded by as many parts as tell it from the other paths.

    Parts at the end that all paths share are left out: runs/a/scores.json and runs/b/scores.json become a and b.

    Raises:
        ArgumentError: two inputs are the same.
    """
    for i, where in enumerate(inputs):
        if str(where) in map(str, inputs[:i]):
            raise ArgumentError(f"inputs: {where} is there twice; expected each once")
    parts = [
        PurePath(str(where).removesuffix(".json") if _is_result(where) else str(where)).parts or (".",)
        for where in inputs
    ]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        longer = [
            length + 1 if names.count(name) > 1 and length < len(part) else length
            for name, part, length in zip(names, parts, lengths, strict=True)
        ]
        if longer == lengths:
            return names if len(set(names)) == len(names) else [str(where) for where in inputs]
        lengths = longer


def _checked(names: Sequence[str], inputs: Sequence[str | Path]) -> list[str]:
    if len(names) != len(inputs):
        raise ArgumentError(f"names: got {len(names)} for {len(inputs)} inputs; expected one for each")
    for name in names:
        if not name.strip() or not name.isprintable() or list(names).count(name) > 1:
            raise ArgumentError(f"names: got {name!r}; expected names of one line, each once")
    return list(names)

"""The page itself: one HTML file that needs no other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdistill import __version__
from fdistill.base.errors import ArgumentError
from fdistill.base.files import atomic_file
from fdistill.config.nested import leaves
from fdistill.report.panels import panels, spread
from fdistill.report.pictures import BUDGET, encoded
from fdistill.report.run import Run
from fdistill.training.alarms import MEANING

_GRIDS = 16  # of a run's slider
_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(runs: Sequence[Run], output: Path, teacher: Mapping[str, float] | None = None) -> None:
    """Writes the page of one run, or of several beside one another.

    Args:
        teacher: {metric: the teacher's score}; by default those in the runs' folders, as far as they agree.

    Raises:
        ArgumentError: no run was scored by any of the teacher's metrics.
        CheckpointError: a sample grid is no picture.
        OutputError: the file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    if teacher is not None:
        _check_teacher(runs, teacher)
    else:
        found = [run.teacher_scores for run in runs]
        teacher = {name: score for scores in found for name, score in scores.items()}
        # Runs of several teachers have no one line.
        teacher = {n: score for n, score in teacher.items() if all(each.get(n, score) == score for each in found)}
    made = panels(runs, teacher)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE.read_text("utf-8"))
    text = template.render(
        title=" and ".join(run.name for run in runs),
        runs=[_shown(run, BUDGET // len(runs)) for run in runs],
        panels=[(panel.title, panel.reading) for panel in made],
        figures=_script([json.loads(panel.figure.to_json()) for panel in made]),
        differences=_differences(runs),
        plotly=get_plotlyjs(),
        version=__version__,
    )
    with atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_teacher(runs: Sequence[Run], teacher: Mapping[str, float]) -> None:
    measured = {
        name.removeprefix("eval/"): None for run in runs for record in run.records for name in record if "eval/" in name
    }
    if not teacher.keys() & measured.keys():
        raise ArgumentError(
            f"teacher-scores: has {', '.join(teacher)}, and the runs' scores are {', '.join(measured) or 'none'}; "
            "expected scores of the runs' own protocol and number of images (eval.protocol, eval.num_images)"
        )


def _shown(run: Run, budget: int) -> dict[str, Any]:
    """What the template shows of a run."""
    iterations = spread(list(run.samples), _GRIDS)
    beside = {"data": "Data", "teacher": "Teacher"}
    names = [name for name in beside if name in run.beside]
    pictures = encoded([*(run.samples[i] for i in iterations), *(run.beside[name] for name in names)], budget)
    last = run.records[-1] if run.records else {}
    return {
        "name": run.name,
        "facts": _summary(run),
        "alarms": _alarms(run),
        "grids": list(zip(iterations, pictures, strict=False)),
        "frames": _script(pictures[: len(iterations)]),
        "beside": [(beside[name], uri) for name, uri in zip(names, pictures[len(iterations) :], strict=True)],
        "prompts": list(dict.fromkeys(run.student.get("prompts", ()))),
        "settings": run.settings,
        "environment": run.environment,
        "data": run.data.get("summary", ""),
        "scores": {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")},
    }


def _summary(run: Run) -> dict[str, str]:
    """The facts at the top of the page."""
    config, last = run.config, run.records[-1] if run.records else {}
    done = f"{run.iteration:,} of {config.iterations:,} iterations" + (
        "" if run.iteration >= config.iterations else "; not finished"
    )
    divergence = run.student.get("divergence") or config.divergence
    found = {
        "teacher": config.teacher + ("" if config.guidance_scale == 1 else f", guidance {config.guidance_scale:g}"),
        "method": config.method + (f", {divergence}" if divergence else ""),
        "progress": done,
        "time": f"{last['seconds'] / 60:.1f} minutes" if "seconds" in last else "",
        "speed": f"{last['images_per_second']:.1f} images a second" if "images_per_second" in last else "",
        "memory": f"{last['memory_gb']:.2f} GB at most" if "memory_gb" in last else "",
        "best student": str(run.best.get("kept_for", "")),
        "device": str(run.environment.get("device", "")),
    }
    return {name: value for name, value in found.items() if value}


def _alarms(run: Run) -> list[str]:
    """A sentence for each alarm: since when, until when, and what it means."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for record in run.records:
        for name in record.get("alarms", ()):
            first.setdefault(name, record["iteration"])
            last[name] = record["iteration"]
    return [
        f"{name}, iterations {first[name]:,} to {last[name]:,}: {MEANING.get(name, 'see docs/runs.md')}"
        for name in first
    ]


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, with the value in each."""
    tables = [{key: str(value) for key, value in leaves(run.config.model_dump(mode="json"))} for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "") for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _script(value: object) -> str:
    """JSON inside a script element: no text in it ends the element."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")

"""The figures of a report: what is in each, and a sentence on how to read it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from fdistill.report.run import TEACHER_SCORES, Run
from fdistill.training.appearance import LOOK
from fdistill.training.curves import STUDENT_LOSSES
from fdistill.training.journal import LOG_RATIO_COUNTS, LOG_RATIO_EDGES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: Of lines and dots, for readers who see few colours (Okabe and Ito 2008); legible on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
_DASHES = ("solid", "dash", "dot", "dashdot")
_STEPS = 12  # of a slider


@dataclass(frozen=True)
class Panel:
    """A figure with its title and a text on how to read it."""

    title: str
    reading: str
    figure: Figure


@dataclass(frozen=True)
class _Curves:
    """Quantities that share axes.

    Attributes:
        names: of records; those that no record has are left out.
        ends: of the vertical axis; None fits the values.
    """

    title: str
    reading: str
    names: tuple[str, ...]
    ends: tuple[float, float] | None = None


_CURVES = (
    _Curves(
        "Student's losses",
        "They do not have to fall: matching is divided by its own size, so that it stays about as large from beginning "
        "to end, and the GAN term follows the discriminator. Look for leaps, and for a loss that grows without end.",
        (*STUDENT_LOSSES, "generator/reward_loss"),
    ),
    _Curves(
        "Fake score's loss",
        "It is the denoising loss on the student's own samples. It falls while the fake score learns them, and moves "
        "with the student afterwards. Ten times as much as before means that it cannot follow: lower generator.lr or "
        "raise critic_steps.",
        ("fake_score/denoising",),
    ),
    _Curves(
        "Discriminator's losses",
        "Both begin near 0.69, which is guessing, and stay not far below. Near 0 the discriminator has won, and its "
        "ratios say little about the student.",
        ("discriminator/gan_real", "discriminator/gan_fake", "discriminator/r1"),
    ),
    _Curves(
        "Discriminator's accuracy and clamped ratios",
        "An accuracy between 0.5 (guessing) and 0.9 is healthy. The share of ratios at ratio.lower or ratio.upper "
        "should be small: those samples all get the same weight.",
        ("discriminator/accuracy", "generator/clamped_ratios"),
        (0.0, 1.0),
    ),
    _Curves(
        "The divergence's weight h(r)",
        "The mean of h over a record's samples, and its least and largest. Where the three lie together, the density "
        "ratio tells samples hardly apart, and the run is nearly DMD2; a wide band is the divergence at work.",
        ("generator/h_min", "generator/h", "generator/h_max"),
    ),
    _Curves(
        "Gradient norms before clipping",
        "Even lines are good. A role whose norm grows for many records is about to break; single peaks are clipped and "
        "do no harm.",
        ("generator/grad_norm", "fake_score/grad_norm", "discriminator/grad_norm"),
    ),
    _Curves(
        "Learning rates",
        "As the config says them; only rates that change are recorded.",
        ("generator/lr", "fake_score/lr", "discriminator/lr"),
    ),
)
_SPEED = (
    _Curves(
        "Images per second", "The student's samples, divided by the time since this start.", ("images_per_second",)
    ),
    _Curves("Memory in use at most, GB", "Of the GPU by torch, or of the process on a CPU.", ("memory_gb",)),
)


def panels(runs: Sequence[Run], teacher: Mapping[str, float]) -> list[Panel]:
    """The figures that these runs have something for.

    Args:
        teacher: {metric: the teacher's score}, drawn as a line.
    """
    made = [*_scores(runs, teacher)]
    made += [panel for curves in _CURVES for panel in _curves(runs, curves)]
    made += [panel for run in runs for panel in (*_accuracy_per_bin(run, runs), *_log_ratios(run, runs))]
    made += _look(runs)
    return made + [panel for curves in _SPEED for panel in _curves(runs, curves)]


def _figure(log: bool = False, ends: tuple[float, float] | None = None) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        margin={"l": 60, "r": 15, "t": 10, "b": 45},
        height=320,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
    )
    figure.update_xaxes(title="iteration", zeroline=False)
    figure.update_yaxes(type="log" if log else "linear", range=ends, zeroline=False, exponentformat="e")
    return figure


def _named(name: str) -> str:
    role, _, quantity = name.partition("/")
    return {"generator": "student"}.get(role, role).replace("_", " ") + (" " + quantity.replace("_", " ")).rstrip()


def _line(figure: Figure, run: Run, name: str, style: tuple[int, int], label: str, *, dots: bool = False) -> None:
    """Adds a quantity of a run; `style` numbers its colour and its dash."""
    from plotly.graph_objects import Scatter

    found = [(record["iteration"], record[name]) for record in run.records if name in record]
    colour, dash = COLOURS[style[0] % len(COLOURS)], _DASHES[style[1] % len(_DASHES)]
    figure.add_trace(
        Scatter(
            x=[x for x, _ in found],
            y=[y for _, y in found],
            name=label,
            mode="lines+markers" if dots or len(found) == 1 else "lines",
            line={"color": colour, "dash": dash},
        )
    )


def _curves(runs: Sequence[Run], curves: _Curves) -> list[Panel]:
    logged = [name for name in curves.names if any(name in record for run in runs for record in run.records)]
    if not logged:
        return []
    values = [record[name] for run in runs for record in run.records for name in logged if name in record]
    figure = _figure(curves.ends is None and min(values) > 0 and max(values) > 20 * min(values), curves.ends)
    for number, run in enumerate(runs):
        for colour, name in enumerate(logged):
            label = _named(name) if len(runs) == 1 else f"{run.name}: {_named(name)}"
            _line(figure, run, name, (number, colour) if len(logged) == 1 else (colour, number), label)
    return [Panel(curves.title, curves.reading, figure)]


def _scores(runs: Sequence[Run], teacher: Mapping[str, float]) -> list[Panel]:
    """A panel for each metric that was measured during training."""
    names = dict.fromkeys(name for run in runs for record in run.records for name in record if name.startswith("eval/"))
    made = []
    for name in names:
        metric = name.removeprefix("eval/")
        values = [record[name] for run in runs for record in run.records if name in record]
        figure = _figure(min(values) > 0 and max(values) > 10 * min(values) and max(values) > 1)
        for number, run in enumerate(runs):
            _line(figure, run, name, (number, 0), run.name if len(runs) > 1 else "student", dots=True)
            _mark_best(figure, run, name)
        reading = "The student with averaged weights, as it is exported; the star is the one in best/."
        if metric in teacher:
            figure.add_hline(teacher[metric], line={"color": "#7F7F7F", "dash": "dash"}, annotation_text="teacher")
            reading += " The dashed line is the teacher."
        else:
            command = _teacher_command(next(run for run in runs if any(name in record for record in run.records)))
            reading += f" For the teacher's line, make this page again after: {command}"
        made.append(Panel(f"Score: {metric}", reading, figure))
    return made


def _teacher_command(run: Run) -> str:
    """What measures a run's teacher as the run measured its student, and puts the scores where a report looks."""
    config = run.config
    given = {
        "protocol": config.eval.protocol,
        "num-images": config.eval.num_images,
        "metrics": None if config.eval.metrics is None else ",".join(config.eval.metrics),
        "reference": config.eval.reference,
        "prompts": config.eval.prompts,
        "guidance-scale": None if config.guidance_scale == 1 else config.guidance_scale,
        "guidance-teacher": config.guidance_teacher,
        "negative-prompt": config.negative_prompt or None,
        "output": f"{run.folder}/{TEACHER_SCORES}",
    }
    options = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["fdistill", "evaluate", config.teacher, *options])


def _mark_best(figure: Figure, run: Run, name: str) -> None:
    from plotly.graph_objects import Scatter

    best = run.best.get("iterations")
    found = [record[name] for record in run.records if record["iteration"] == best and name in record]
    if found:
        star = {"symbol": "star", "size": 14, "color": COLOURS[4]}
        figure.add_trace(Scatter(x=[best], y=found, mode="markers", marker=star, name="best", showlegend=False))


def _accuracy_per_bin(run: Run, runs: Sequence[Run]) -> list[Panel]:
    name = "discriminator/accuracy_per_bin"
    rows = {record["iteration"]: record[name] for record in run.records if name in record}
    if not rows:
        return []
    from plotly.graph_objects import Heatmap

    figure = _figure()
    table = list(zip(*rows.values(), strict=True))
    bins = [number + 1 for number in range(len(table))]
    shown = Heatmap(x=list(rows), y=bins, z=table, zmin=0.5, zmax=1, colorscale="Cividis", colorbar={"title": "share"})
    figure.add_trace(shown)
    figure.update_yaxes(title="noise bin, least noise first", dtick=1)
    reading = (
        "The share of images that the discriminator tells right, bin by bin. Little noise should be easier than much. "
        "Bright rows at the top, where noise hides nearly everything, mean that it sees something that it should not."
    )
    return [Panel(_title("Discriminator's accuracy per noise bin", run, runs), reading, figure)]


def _log_ratios(run: Run, runs: Sequence[Run]) -> list[Panel]:
    """Histograms of the log density ratio for each noise bin, with a slider over training."""
    tables = {r["iteration"]: r[LOG_RATIO_COUNTS] for r in run.records if LOG_RATIO_COUNTS in r}
    if not tables:
        return []
    from plotly.graph_objects import Heatmap

    chosen = spread(list(tables), _STEPS)
    shares = [[[n / max(1, sum(row)) for n in row] for row in tables[iteration]] for iteration in chosen]
    edges = [f"{edge:g}" for edge in LOG_RATIO_EDGES]
    labels = [f"< {edges[0]}", *(f"{a} to {b}" for a, b in pairwise(edges)), f"> {edges[-1]}"]
    bins = [number + 1 for number in range(len(shares[0]))]
    figure = _figure()
    scale = {"zmin": 0.0, "zmax": 1.0, "colorscale": "Cividis", "colorbar": {"title": "share"}}
    figure.add_trace(Heatmap(x=labels, y=bins, z=shares[-1], **scale))
    steps = [
        {"label": str(iteration), "method": "restyle", "args": [{"z": [share]}]}
        for iteration, share in zip(chosen, shares, strict=True)
    ]
    slider = {"active": len(steps) - 1, "steps": steps, "currentvalue": {"prefix": "iteration "}, "pad": {"t": 45}}
    figure.update_layout(sliders=[slider], height=420)
    figure.update_xaxes(title="log(p teacher / p student), by the discriminator")
    figure.update_yaxes(title="noise bin, least noise first", dtick=1)
    reading = (
        "Each row is a histogram over the samples of one noise bin. At the end of a good run most lie around 0: the "
        "discriminator finds samples as likely as data. Much weight below -2 is a student that makes images which "
        "the teacher would not."
    )
    return [Panel(_title("Density ratios per noise bin", run, runs), reading, figure)]


def _look(runs: Sequence[Run]) -> list[Panel]:
    """How samples look, divided by the teacher's."""
    figure, found = _figure(), False
    figure.add_hline(1, line={"color": "#7F7F7F", "dash": "dash"})
    for number, run in enumerate(runs):
        for colour, name in enumerate(("brightness", "contrast", "saturation", "diversity")):
            own, teacher = LOOK + name, f"{LOOK}teacher_{name}"
            records = [r for r in run.records if r.get(teacher, 0) > 0.02 and own in r]
            if records:
                found = True
                ratios = [{"iteration": r["iteration"], own: r[own] / r[teacher]} for r in records]
                label = name if len(runs) == 1 else f"{run.name}: {name}"
                _line(figure, replace(run, records=ratios), own, (colour, number), label, dots=True)
    reading = (
        "All four should end near 1. A contrast or saturation that rises above it is guidance that burns colours; a "
        "diversity far below it is a student whose images of one class or prompt are alike."
    )
    return [Panel("How samples look, divided by the teacher's", reading, figure)] if found else []


def _title(title: str, run: Run, runs: Sequence[Run]) -> str:
    return title if len(runs) == 1 else f"{title}: {run.name}"


def spread(values: Sequence[int], count: int) -> list[int]:
    """So many of the values, evenly spread, with the first and the last; all if there are fewer."""
    if len(values) <= count:
        return list(values)
    return [values[round(number * (len(values) - 1) / (count - 1))] for number in range(count)]

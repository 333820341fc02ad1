"""A comparison as a figure: quality over evaluations for each image, and over seconds for each image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.comparison.entries import Comparison, Entry
from evaluation.comparison.labels import place_labels
from evaluation.protocols import higher_is_better

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = {"student": "o", "teacher": "s"}
_OTHER_MARKER = "D"
_LOG_FROM = 4.0  # an axis of distances is logarithmic if the largest is this many times the smallest
_ROOM = 0.12  # share of an axis left empty beyond its outermost points
_FONT = 8


def draw(comparison: Comparison) -> Figure:
    """The comparison's first metric over evaluations (left) and seconds (right) for each image; each point has a name.

    Error bars are spreads, and open points are not ranked. Points of one checkpoint with several numbers of steps are
    joined by a line. The text below says what is not drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = comparison.metrics[0]
    measured = [entry for entry in comparison.entries if metric in entry.scores]
    evaluated = {e.name: e.evaluations_per_image for e in measured if e.evaluations_per_image is not None}
    timed = {e.name: e.seconds_per_image for e in measured if e.seconds_per_image is not None}
    devices = {entry.name: entry.device or "an unknown device" for entry in measured if entry.name in timed}
    usual = max(devices.values(), key=list(devices.values()).count, default="")
    elsewhere = {name: f" (on {device})" for name, device in devices.items() if device != usual}
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    drawn = [entry for entry in measured if entry.name in evaluated | timed]
    series = list(dict.fromkeys(map(_series, comparison.entries)))
    colours = {entry.name: f"C{series.index(_series(entry)) % 10}" for entry in comparison.entries}
    for axes, across in ((left, evaluated), (right, timed)):
        _points(axes, metric, [entry for entry in drawn if entry.name in across], across, colours)
    left.set_xlabel("evaluations per image")
    right.set_xlabel("seconds per image")
    _quality_axis(left, comparison, drawn)
    _legend(figure, drawn)
    seconds = f"Seconds on {usual}{', unless stated otherwise' if elsewhere else ''}" if usual else ""
    below = "\n".join(textwrap.wrap(_below(comparison, seconds), 150))
    figure.supxlabel(below, fontsize=_FONT, color="0.3", parse_math=False)
    figure.draw_without_rendering()  # settles the layout, which the names must not change any more
    figure.set_layout_engine("none")
    for axes, across, suffixes in ((left, evaluated, {}), (right, timed, elsewhere)):
        _names(axes, metric, [entry for entry in drawn if entry.name in across], across, colours, suffixes)
    return figure


def _names(
    axes: Any,
    metric: str,
    entries: Sequence[Entry],
    across: Mapping[str, float],
    colours: Mapping[str, str],
    suffixes: Mapping[str, str],
) -> None:
    from matplotlib.colors import to_rgb

    names = [entry.name + suffixes.get(entry.name, "") for entry in entries]
    scores = [entry.scores[metric] for entry in entries]
    points = [(across[entry.name], score.value) for entry, score in zip(entries, scores, strict=True)]
    bars = [(x, y - (score.spread or 0), y + (score.spread or 0)) for (x, y), score in zip(points, scores, strict=True)]
    dark = [tuple(0.6 * part for part in to_rgb(colours[entry.name])) for entry in entries]
    place_labels(axes, points, names, dark, bars, _FONT)


def _points(
    axes: Any, metric: str, entries: Sequence[Entry], across: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    for entry in entries:
        score, colour = entry.scores[metric], colours[entry.name]
        axes.errorbar(
            across[entry.name],
            score.value,
            yerr=score.spread,
            fmt=_marker(entry),
            color=colour,
            markerfacecolor="white" if metric in entry.unlike else colour,
            markersize=6.5,
            capsize=3,
            elinewidth=1,
        )
    for one in dict.fromkeys(map(_series, entries)):
        joined = [entry for entry in entries if _series(entry) == one and metric not in entry.unlike]
        steps = {entry.evaluations_per_image for entry in joined}
        if len(joined) > 1 and len(steps) == len(joined):
            line = sorted((across[entry.name], entry.scores[metric].value) for entry in joined)
            axes.plot(*zip(*line, strict=True), color=colours[joined[0].name], linewidth=1, alpha=0.5)
    axes.grid(True, which="major", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if entries:
        _logarithmic(axes.xaxis, axes.set_xlim, axes.set_xscale, [across[entry.name] for entry in entries])
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5", fontsize=_FONT)


def _quality_axis(axes: Any, comparison: Comparison, entries: Sequence[Entry]) -> None:
    """Scales the axis: logarithmic for distances (lower is better) that differ by much, else linear."""
    metric = comparison.metrics[0]
    higher = higher_is_better(metric)
    way = {True: " (higher is better)", False: " (lower is better)", None: ""}[higher]
    axes.set_ylabel(comparison.full_name(metric) + way)
    if not entries:
        return
    scores = [entry.scores[metric] for entry in entries]
    low = min(score.value - (score.spread or 0) for score in scores)
    high = max(score.value + (score.spread or 0) for score in scores)
    if higher is False and low > 0 and high / low >= _LOG_FROM:
        _logarithmic(axes.yaxis, axes.set_ylim, axes.set_yscale, [low, high])
    else:
        room = _ROOM * ((high - low) or abs(high) or 1)
        axes.set_ylim(low - room, high + room)


def _logarithmic(axis: Any, set_limits: Any, set_scale: Any, values: Sequence[float]) -> None:
    """Makes an axis logarithmic, with numbers at 1, 2 and 5 times powers of ten, or at these alone if it spans many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    room = max((high / low) ** _ROOM, 1.3)
    set_scale("log")
    set_limits(low / room, high * room)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _series(entry: Entry) -> tuple[object, ...]:
    """What results of one checkpoint with several numbers of steps share."""
    facts = entry.provenance
    return (facts.get("checkpoint_sha256") or entry.name, facts.get("sampler"), facts.get("guidance"))


def _marker(entry: Entry) -> str:
    return _MARKERS.get(str(entry.provenance.get("kind")), _OTHER_MARKER)


def _legend(figure: Any, entries: Sequence[Entry]) -> None:
    """Says which shape is which kind, if there are several."""
    from matplotlib.lines import Line2D

    kinds = {_marker(entry): str(entry.provenance.get("kind") or "other") for entry in entries}
    if len(kinds) > 1:
        handles = [Line2D([], [], marker=m, linestyle="", color="0.4", label=kind) for m, kind in kinds.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(kinds), frameon=False, fontsize=_FONT)


def _below(comparison: Comparison, seconds: str) -> str:
    """The text below: what seconds, bars and open points are, and what is not drawn."""
    metric = comparison.metrics[0]
    scores = [entry.scores[metric] for entry in comparison.entries if metric in entry.scores]
    spreads = dict.fromkeys(score.spread_of or "unknown" for score in scores if score.spread is not None)
    unlike = [f"{entry.name} ({entry.unlike[metric]})" for entry in comparison.entries if metric in entry.unlike]
    absent = []
    for entry in comparison.entries:
        known = (
            (f"no {comparison.full_name(metric)}", entry.scores.get(metric)),
            ("no evaluations per image", entry.evaluations_per_image),
            ("no seconds per image", entry.seconds_per_image),
        )
        lacks = [what for what, value in known if value is None]
        if lacks:
            absent.append(f"{entry.name} ({', '.join(lacks)})")
    said = [
        f"Protocol {comparison.protocol}",
        seconds,
        f"Bars: spread over {' or '.join(spreads)}" if spreads else "",
        f"Open: not ranked, {', '.join(unlike)}" if unlike else "",
        f"Not in both panels: {', '.join(absent)}" if absent else "",
    ]
    return ". ".join(sentence for sentence in said if sentence) + "."

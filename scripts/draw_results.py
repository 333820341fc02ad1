"""The figure of docs/choosing-a-divergence.md, from the table of methods and divergences in docs/results.md.

python scripts/draw_results.py docs/divergences.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from fdistill.base.files import atomic_file
from fdistill.divergence import ALIASES

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
TEACHER, OURS = "teacher", "f-distill "


class Score(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    spread: float


class Row(NamedTuple):
    """A row of the table; a divergence has its full name."""

    name: str
    distance: Score
    precision: Score
    recall: Score


def rows(text: str) -> list[Row]:
    """The rows of the first table of the page."""
    found = []
    for line in text[text.index("| teacher |") :].partition("\n\n")[0].splitlines():
        name, _, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        scores = [Score(*(float(number) for number in re.findall(r"[\d.]+", cell))) for cell in cells[:3]]
        short = name.removeprefix(OURS)
        found.append(Row(OURS + ALIASES.get(short, short) if name.startswith(OURS) else name, *scores))
    return found


def draw(found: list[Row]) -> Figure:
    """Distances of f-distill by divergence, and precision and recall of all rows."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    distance, plane = figure.subplots(1, 2)
    teacher = next(row for row in found if row.name == TEACHER)
    ours = sorted((row for row in found if row.name.startswith(OURS)), key=lambda row: -row.distance.mean)
    names, scores = [row.name.removeprefix(OURS) for row in ours], [row.distance for row in ours]
    distance.errorbar(
        [s.mean for s in scores], names, xerr=[s.spread for s in scores], fmt="o", color="#0072B2", capsize=3
    )
    distance.axvline(teacher.distance.mean, color="#7F7F7F", linestyle="--")
    distance.text(teacher.distance.mean + 0.01, len(ours) - 1, "teacher", color="#5F5F5F", va="center")
    distance.set(
        title="f-distill by divergence, about 120 iterations", xlabel="fd_digits (lower is better)", xlim=(0, None)
    )
    groups = {
        "f-distill": ("o", "#0072B2", ours),
        "other methods": ("s", "#D55E00", [row for row in found if not row.name.startswith(OURS) and row != teacher]),
        "teacher": ("*", "#5F5F5F", [teacher]),
    }
    for label, (marker, colour, members) in groups.items():
        errors = {"xerr": [row.recall.spread for row in members], "yerr": [row.precision.spread for row in members]}
        x, y = [row.recall.mean for row in members], [row.precision.mean for row in members]
        plane.errorbar(x, y, **errors, fmt=marker, color=colour, markersize=6, elinewidth=0.7, label=label)
    plane.set(title="diverse or precise", xlabel="recall", ylabel="precision")
    plane.legend(loc="lower left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with atomic_file(arguments.output) as temporary:
        draw(rows(PAGE.read_text(encoding="utf-8"))).savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()

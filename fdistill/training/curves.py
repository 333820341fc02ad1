"""Training curves of a run, as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdistill.base.files import atomic_file
from fdistill.training.appearance import LOOK

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: The terms of the student's loss, by their names in records.
STUDENT_LOSSES = (
    *("generator/matching", "generator/implicit", "generator/regression", "generator/gan", "generator/augmentation"),
    *("generator/diversity", "generator/segment", "generator/image", "generator/noise_kl"),
)
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("student", STUDENT_LOSSES),
    ("critic", ("fake_score/denoising", "discriminator/gan_real", "discriminator/gan_fake")),
    ("minus the preference score", ("generator/reward_loss",)),
    ("gradient norms before clipping", ("generator/grad_norm", "fake_score/grad_norm", "discriminator/grad_norm")),
    ("h(r)", ("generator/h_min", "generator/h", "generator/h_max")),
    ("discriminator accuracy, clamped ratios", ("discriminator/accuracy", "generator/clamped_ratios")),
)


def save_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots everything a run logs over iterations, and the discriminator's accuracy per noise bin, into one PNG.

    Quantities that the records do not have get no panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = _panels(records)
    rows = [record.get("discriminator/accuracy_per_bin") for record in records]
    count = len(panels) + any(rows)
    if not count:
        return  # a run that was whole when it was resumed, and whose records are gone
    height, width = (1, count) if count <= 3 else (2, -(-count // 2))
    figure = Figure(figsize=(5 * width, 4 * height))
    # Margins around each panel in inches. They are fixed because matplotlib's layout engines, which measure every
    # text, would take longer than everything else here.
    left, right, below, above = 0.7, 0.2, 0.5, 0.55
    figure.subplots(
        height,
        width,
        gridspec_kw={
            "left": left / (5 * width),
            "right": 1 - right / (5 * width),
            "bottom": below / (4 * height),
            "top": 1 - above / (4 * height),
            "wspace": (left + right) / (5 - left - right),
            "hspace": (below + above) / (4 - below - above),
        },
    )
    for axes in figure.axes[count:]:
        axes.remove()
    iterations = [record["iteration"] for record in records]
    for axes, (title, names) in zip(figure.axes, panels, strict=False):
        axes.set_title(textwrap.fill(title, 40))
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if names[0].startswith("eval/"):
            _plot_scores(axes, {r["iteration"]: r[names[0]] for r in records if names[0] in r})
            continue
        if names[0].startswith(LOOK):
            _plot_look(axes, records, [name.removeprefix(LOOK) for name in names])
            continue
        for name in names:
            label = name.replace("generator/grad", "student grad").removeprefix("generator/")
            label = label.replace("/", " ").replace("_", " ")
            axes.plot(iterations, [record.get(name, np.nan) for record in records], label=label)
        axes.legend(fontsize=8)
        if title.startswith("discriminator"):
            axes.set_ylim(0, 1)
        elif all(record.get(name, 1.0) > 0 for record in records for name in names):
            axes.set_yscale("log")  # an implicit objective may be negative, and stays linear
    if any(rows):
        last = figure.axes[len(panels)]
        table = np.array([[np.nan if v is None else v for v in row] for row in rows if row], dtype=float).T
        shown = last.imshow(
            table, aspect="auto", origin="lower", vmin=0.5, vmax=1, extent=(0, iterations[-1], 0, len(table))
        )
        figure.colorbar(shown, ax=last)
        last.set_title("discriminator accuracy per noise bin (low to high)")
        last.set_xlabel("iteration")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _panels(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The title of each panel, and the quantities in it."""
    logged = dict.fromkeys(name for record in records for name in record)
    panels = [(title, [name for name in names if name in logged]) for title, names in _PANELS]
    panels = [(title, names) for title, names in panels if names]
    panels += [(name.removeprefix("eval/"), [name]) for name in logged if name.startswith("eval/")]
    look = [name.replace("teacher_", "") for name in logged if name.startswith(f"{LOOK}teacher_")]
    return panels + ([("samples, divided by the teacher's", look)] if look else [])


def _plot_look(axes: Axes, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Plots how the student's samples look as multiples of the teacher's; only some records have them."""
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    for name in names:
        pairs = {r["iteration"]: (r[f"{LOOK}{name}"], r[f"{LOOK}teacher_{name}"]) for r in records if LOOK + name in r}
        ratios = [own / teacher if teacher else np.nan for own, teacher in pairs.values()]
        axes.plot(list(pairs), ratios, marker="o", markersize=4, label=name)
    axes.legend(fontsize=8)


def _plot_scores(axes: Axes, scores: Mapping[int, float]) -> None:
    """Plots evaluation scores, which only some iterations have."""
    axes.plot(list(scores), list(scores.values()), marker="o", markersize=4)
    if min(scores.values()) > 0 and max(scores.values()) > 10 * min(scores.values()) and max(scores.values()) > 1:
        axes.set_yscale("log")  # a distance falls by orders of magnitude; a share stays as it is
    else:
        axes.ticklabel_format(axis="y", useOffset=False)

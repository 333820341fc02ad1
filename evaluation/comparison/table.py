"""A comparison as a table: aligned text for a terminal, or Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.comparison.entries import Comparison, Entry, identity
from evaluation.metrics.score import Score
from evaluation.protocols import higher_is_better

_MAX_DECIMALS = 6


@dataclass(frozen=True)
class Cell:
    """A cell of the table: a number as text, its spread, whether it is the best, and the letter of its note."""

    value: str
    spread: str = ""
    best: bool = False
    letter: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its title, its direction (None: neither is better), and a cell for each entry."""

    title: str
    higher_is_better: bool | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Columns, names of the rows, and the notes under the table; `lettered` are (letter, note) of single cells."""

    title: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    lettered: tuple[tuple[str, str], ...]


def text_table(comparison: Comparison) -> str:
    """The table for a terminal, in ASCII apart from names. The best value of a column has a star behind it."""
    table = _table(comparison)
    columns = [_aligned(["", *table.names], str.ljust)]
    for column in table.columns:
        values = _aligned([cell.value for cell in column.cells], str.rjust)
        spreads = _aligned([f" +- {cell.spread}" if cell.spread else "" for cell in column.cells], str.ljust)
        marks = [("*" if cell.best else "") + (f"[{cell.letter}]" if cell.letter else "") for cell in column.cells]
        marks = _aligned([f" {mark}" if mark else "" for mark in marks], str.ljust)
        numbers = ["".join(parts) for parts in zip(values, spreads, marks, strict=True)]
        columns.append(_aligned([column.title, *numbers], str.rjust))
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    lines.insert(1, "-" * max(map(len, lines)))
    notes = [_in_words(table), *table.notes, *(f"[{letter}] {sentence}" for letter, sentence in table.lettered)]
    return "\n".join([table.title, "", *lines, "", *(note for note in notes if note)])


def markdown_table(comparison: Comparison) -> str:
    """The same table in Markdown. The best value of a column is bold."""
    table = _table(comparison)
    arrows = {True: " ↑", False: " ↓", None: ""}
    rows = [["", *(_escaped(column.title) + arrows[column.higher_is_better] for column in table.columns)]]
    rows.append([":--", *("--:" for _ in table.columns)])
    for i, name in enumerate(table.names):
        rows.append([_escaped(name), *(_markdown(column.cells[i]) for column in table.columns)])
    notes = [
        "Bold: the best, and those whose spread touches its." if _any_best(table) else "",
        *(_escaped(note).replace("+-", "±") for note in table.notes),
        *(f"<sup>{letter}</sup> {_escaped(sentence)}" for letter, sentence in table.lettered),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n\n".join([_escaped(table.title), "\n".join(lines), *(note for note in notes if note)]) + "\n"


def _markdown(cell: Cell) -> str:
    text = f"{cell.value} ± {cell.spread}" if cell.spread else cell.value
    text = f"**{text}**" if cell.best else text
    return f"{text} <sup>{cell.letter}</sup>" if cell.letter else text


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_|<\[\]])", r"\\\1", text)


def _aligned(texts: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, texts))
    return [justify(text, width) for text in texts]


def _in_words(table: Table) -> str:
    """What the star means, and the direction of each column."""
    ways = [
        f"{way} is better: {', '.join(titles)}"
        for way, higher in (("lower", False), ("higher", True))
        if (titles := [column.title for column in table.columns if column.higher_is_better is higher])
    ]
    star = "* the best, and those whose spread touches its; " if _any_best(table) else ""
    return f"{star}{'; '.join(ways)}." if ways else ""


def _any_best(table: Table) -> bool:
    return any(cell.best for column in table.columns for cell in column.cells)


def _table(comparison: Comparison) -> Table:
    entries = comparison.entries
    unlike = [f"Not ranked: {e.unlike[m]}." for m in comparison.metrics for e in entries if m in e.unlike]
    timed = list(dict.fromkeys(_timed(entry) for entry in entries if entry.seconds_per_image is not None))
    sentences = [*dict.fromkeys(unlike), *(timed if len(timed) > 1 else [])]
    letters = {sentence: _letter(i) for i, sentence in enumerate(sentences)}
    evaluations = [Cell("-" if e.evaluations_per_image is None else f"{e.evaluations_per_image:g}") for e in entries]
    seconds = [
        Cell("-")
        if entry.seconds_per_image is None
        else Cell(f"{entry.seconds_per_image:.3g}", letter=letters.get(_timed(entry), ""))
        for entry in entries
    ]
    columns = (
        *(_scores(comparison, metric, letters) for metric in comparison.metrics),
        Column("evaluations/image", None, tuple(evaluations)),
        Column("seconds/image", None, tuple(seconds)),
    )
    notes = [_of_spreads(comparison), *(timed if len(timed) == 1 else []), _of_guidance(entries)]
    return Table(
        _of_protocol(comparison),
        tuple(entry.name for entry in entries),
        columns,
        tuple(note for note in notes if note),
        tuple((letter, sentence) for sentence, letter in letters.items()),
    )


def _letter(index: int) -> str:
    """a ... z, aa, ab ..."""
    first, second = divmod(index, 26)
    return (chr(96 + first) if first else "") + chr(97 + second)


def _scores(comparison: Comparison, metric: str, letters: Mapping[str, str]) -> Column:
    entries, higher = comparison.entries, higher_is_better(metric)
    digits = _decimals([entry.scores[metric] for entry in entries if metric in entry.scores])
    ranked = [entry.scores[metric] for entry in entries if metric in entry.scores and metric not in entry.unlike]
    best = None
    if higher is not None and len(ranked) > 1:
        best = (max if higher else min)(ranked, key=lambda score: score.value)
    cells = []
    for entry in entries:
        score = entry.scores.get(metric)
        if score is None:
            cells.append(Cell("-"))
            continue
        spread = "" if score.spread is None else f"{score.spread:.{digits}f}"
        letter = letters[f"Not ranked: {entry.unlike[metric]}."] if metric in entry.unlike else ""
        marked = best is not None and not letter and _as_good(score, best)
        cells.append(Cell(f"{score.value:.{digits}f}", spread, marked, letter))
    return Column(comparison.full_name(metric), higher, tuple(cells))


def _as_good(score: Score, best: Score) -> bool:
    """Whether a score may be as good as the best one: their spreads touch."""
    return abs(score.value - best.value) <= (score.spread or 0) + (best.spread or 0)


def _decimals(scores: Sequence[Score]) -> int:
    """How many decimals show two digits of the smallest spread, or four of the largest value if there is no spread."""
    spreads = [score.spread for score in scores if score.spread]
    size = min(spreads) if spreads else max(abs(score.value) for score in scores)
    first = math.floor(math.log10(size)) if size > 0 else 0
    return min(max((1 if spreads else 3) - first, 0), _MAX_DECIMALS)


def _of_spreads(comparison: Comparison) -> str:
    """What +- is over for each metric; if entries differ in that, it names the entries with the rarer kinds."""
    metrics_over: dict[str, list[str]] = {}
    for metric in comparison.metrics:
        found: dict[str, list[str]] = {}
        for entry in comparison.entries:
            score = entry.scores.get(metric)
            if score is not None and score.spread is not None:
                found.setdefault(score.spread_of or "unknown", []).append(entry.name)
        usual = max(found, key=lambda spread_of: len(found[spread_of]), default="")
        for spread_of, names in found.items():
            whose = f" of {', '.join(names)}" if spread_of != usual else ""
            metrics_over.setdefault(spread_of, []).append(f"{metric}{whose}")
    said = [f"{spread_of} ({', '.join(which)})" for spread_of, which in metrics_over.items()]
    return f"+- is over: {'; '.join(said)}." if said else ""


def _timed(entry: Entry) -> str:
    """On which device its seconds were measured."""
    batch = entry.provenance.get("timed_batch_size")
    return f"Seconds on {entry.device or 'an unknown device'}" + (f", {batch} images at a time." if batch else ".")


def _of_guidance(entries: Sequence[Entry]) -> str:
    """The guidance scale of each entry; nothing if no entry was guided (a scale of 1 is no guidance)."""
    scales: dict[str, list[str]] = {}
    for entry in entries:
        scale = entry.provenance.get("guidance")
        scales.setdefault("none" if scale in (None, 1) else f"{scale:g}", []).append(entry.name)
    said = [f"{scale} ({', '.join(names)})" for scale, names in scales.items()]
    return f"Guidance scale: {'; '.join(said)}." if list(scales) != ["none"] else ""


def _of_protocol(comparison: Comparison) -> str:
    provenance = comparison.usual(comparison.metrics[0]).provenance
    count, reference = provenance.get("num_samples"), provenance.get("reference")
    samples = f", {count} samples" if count else ""
    return f"Protocol {comparison.protocol}{samples}" + (f", reference {identity(reference)}" if reference else "")

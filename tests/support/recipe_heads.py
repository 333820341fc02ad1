"""What the comment at the top of a recipe says: its paragraphs, where each setting is from, and its hours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from fdistill.commands.recipe_heads import covers, ours, paragraphs, published

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def settings(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of everything that a config's file sets, its smoke section apart."""
    names: set[str] = set()
    for key, value in values.items():
        if prefix or key != "smoke":
            names |= settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key}
    return names


def problems(text: str) -> list[str]:
    """What is wrong with the lists of a config's head: nothing, if each setting is in one of them and in one alone."""
    written = settings(YAML(typ="safe", pure=True).load(text))
    found = paragraphs(text)
    names: list[str] = []
    wrong: list[str] = []
    for source, published_there in published(found):
        wrong += [] if source else [f"as published where? {', '.join(published_there)[:40]}"]
        names += published_there
    for group, why in ours(found):
        wrong += [] if why else [f"no reason: {', '.join(group)}"]
        names += group
    for setting in sorted(written):
        by = [name for name in names if covers(name, setting)]
        if len(by) != 1:
            wrong.append(f"{setting}: {'in neither list' if not by else 'named twice'}")
    wrong += [f"{name}: not in the config" for name in names if not any(covers(name, s) for s in written)]
    return wrong + [f"{name}: named twice" for name in sorted(set(names)) if names.count(name) > 1]


class WarmUp(NamedTuple):
    """A stage of regression on pairs; operations in TFLOP, those that make the pairs included."""

    pairs: int
    iterations: int
    total: float


class Hours(NamedTuple):
    """The numbers of `# Hours:`; rates in TFLOP/s per GPU, operations in TFLOP."""

    assumed: float
    assumed_rate: float
    implied: float
    implied_rate: float
    gpus: int
    passes: float
    forward: float
    iterations: int
    batch: int
    total: float
    warm_up: WarmUp | None


_UNITS = {"GFLOP": 1e-3, "TFLOP": 1.0}
_HOURS = re.compile(
    r"([\d,]+) on (8|one) .*?at an assumed (\d+) TFLOP/s(?: per GPU)?, ([\d,]+) at (?:the )?(\d+)\D.*?\(estimated\)\. "
    r"Each \w+ of an iteration costs about (\d+) forward passes of ([\d.]+) (\w+), so ([\d,]+) iterations of ([\d,]+) "
    r"\w+ are ([\d.e]+) FLOP\."
    r"(?: Before that, ([\d,]+) pairs and ([\d,]+) iterations on them are ([\d.e]+) FLOP\.)?"
)


def hours(text: str) -> Hours:
    """The numbers in the paragraph about hours."""
    (paragraph,) = (p for p in paragraphs(text) if p.heading == "Hours")
    match = _HOURS.match(paragraph.text)
    assert match, paragraph.text
    said = [value.replace(",", "") for value in match.groups() if value]
    return Hours(
        float(said[0]),
        float(said[2]),
        float(said[3]),
        float(said[4]),
        8 if said[1] == "8" else 1,
        float(said[5]),
        float(said[6]) * _UNITS[said[7]],
        int(said[8]),
        int(said[9]),
        float(said[10]) / 1e12,
        WarmUp(int(said[11]), int(said[12]), float(said[13]) / 1e12) if said[11:] else None,
    )


def table_rows(page: str, header: Iterable[str]) -> list[list[str]]:
    """The cells of the tables of a Markdown page that have this header."""
    lines = page.splitlines()
    rows: list[list[str]] = []
    start = f"| {' | '.join(header)} |"
    for place in (place for place, line in enumerate(lines) if line == start):
        for line in lines[place + 2 :]:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, start
    return rows

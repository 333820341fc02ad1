"""Names of files as people and their systems write them: numbers without zeros in front, accents in two spellings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

_DIGITS = re.compile("[0-9]+")
_WIDTH = 20


def natural_key(name: str) -> str:
    """Sorts 2.png before 10.png. Names whose numbers have equally many digits are sorted as text is."""
    return _DIGITS.sub(lambda digits: digits[0].zfill(_WIDTH), name)


def natural_order(names: Sequence[str]) -> list[int]:
    """The places of names in natural order."""
    return sorted(range(len(names)), key=lambda place: (natural_key(names[place]), names[place]))


def composed(name: str) -> str:
    """A name with its accents in one spelling: macOS writes e and an accent where other systems write one letter."""
    return unicodedata.normalize("NFC", name)


def by_spelling(names: Iterable[str]) -> Mapping[str, str]:
    """{spelling: name}: each name by itself, and by its composed spelling if no other name has it."""
    known = list(names)
    found: dict[str, str] = {}
    for name in known:
        found[composed(name)] = name if composed(name) not in found else ""
    return {spelling: name for spelling, name in found.items() if name} | {name: name for name in known}


def shown(name: str) -> str:
    """A name that a line of a terminal or of a file can hold: line ends and bytes that are no text are spelt out."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)

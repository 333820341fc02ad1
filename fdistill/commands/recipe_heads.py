"""What the comment at the top of a recipe says: its paragraphs, and where each of its settings is from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

_PARAGRAPH = re.compile(r"([A-Z][a-z]+(?: published)?)(?: \(([^()]*)\))?: (.*)", re.DOTALL)


class Paragraph(NamedTuple):
    """`# Heading (source): text`, on one line."""

    heading: str
    source: str | None
    text: str


def paragraphs(text: str) -> list[Paragraph]:
    """The paragraphs of a config's head; continuation lines are indented. The first, without a heading, is left out."""
    lines = text.partition("\nmethod:")[0].splitlines()
    joined = re.sub(r"\n#   +(?=\S)", " ", "\n".join(lines))
    found = (_PARAGRAPH.fullmatch(line.removeprefix("# ")) for line in joined.split("\n"))
    return [Paragraph(match[1], match[2], match[3]) for match in found if match]


def published(found: list[Paragraph]) -> Iterator[tuple[str | None, list[str]]]:
    """Where something was published, and the names of the settings that are from there."""
    for paragraph in found:
        if paragraph.heading == "As published":
            yield paragraph.source, _listed(_until_the_first_stop(paragraph.text))


def ours(found: list[Paragraph]) -> Iterator[tuple[list[str], str]]:
    """Names and reason of each group of "a, b (why); c (why)." in what is this project's own."""
    for paragraph in found:
        if paragraph.heading == "Ours":
            for group in re.split(r";\s+(?=[^()]*(?:\(|$))", _until_the_first_stop(paragraph.text)):
                match = re.fullmatch(r"([^()]+?)\s*(?:\((.*)\))?", group)
                assert match, group
                yield _listed(match[1]), match[2] or ""


def covers(name: str, setting: str) -> bool:
    """Whether a name in a list is a setting, a section that holds it, or one of several sections ("*.lr")."""
    return fnmatchcase(setting, name) or setting.startswith(f"{name}.")


def origin(text: str, setting: str) -> str:
    """Where a recipe's setting is from, or why it has its value; "" where the head does not say it."""
    found = paragraphs(text)
    for source, names in published(found):
        if any(covers(name, setting) for name in names):
            return f"as published: {source}"
    return next((why for names, why in ours(found) if any(covers(name, setting) for name in names)), "")


def _listed(text: str) -> list[str]:
    """The names of "a, b.c and d"."""
    return [name for name in re.split(r",\s+(?:and\s+)?|\s+and\s+", text.strip()) if name]


def _until_the_first_stop(text: str) -> str:
    """Up to the first full stop outside parentheses."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "." and not depth and re.match(r"\.(\s|$)", text[place:]):
            return text[:place]
    return text

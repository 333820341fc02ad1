"""Reading captions: from text files and JSON in UTF-8. A data set has one for each of its images, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.base.reading import parse_json

#: The keys that a caption may have in JSON; if an object has several of them, the first counts.
CAPTION_KEYS = ("caption", "text", "prompt")


def decoded(content: bytes, where: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: it holds bytes that are not UTF-8, or zero bytes; the message names their line.
    """
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{where}: a zero byte in line {_line(content, zero)}, so this is a binary or UTF-16 file; save it as UTF-8"
        )
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {content[error.start]:#04x} in line {_line(content, error.start)} is not UTF-8; save the "
            "file as UTF-8"
        ) from error


def text_lines(content: bytes, where: str) -> list[tuple[int, str]]:
    """(number from 1, line without surrounding spaces) of each line that is not blank. Lines end in LF or CRLF.

    Raises:
        DataError: the content is not UTF-8.
    """
    # Not splitlines(), which also splits at characters such as U+2028 that JSON and prompts may hold.
    lines = [(number, line.strip()) for number, line in enumerate(decoded(content, where).split("\n"), 1)]
    return [(number, line) for number, line in lines if line]


def check_no_gaps(numbers: Sequence[int], where: str) -> None:
    """Raises DataError for the first blank line in a list that goes with others line by line; blank lines behind the
    last one do not count.

    Args:
        numbers: of the lines that are not blank, from 1.
    """
    gap = next((place for place, number in enumerate(numbers, 1) if number != place), None)
    if gap is not None:
        raise DataError(
            f"{where}: line {gap} is blank, but each line belongs to one image, in their order; write its text, or "
            "remove the line"
        )


def json_lines(content: bytes, where: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl file that is not blank.

    Raises:
        DataError: the content is not UTF-8, or a line is not a JSON object.
    """
    found = []
    for number, line in text_lines(content, where):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: line {number} is not JSON ({error}); expected one object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: line {number} is {line[:40]!r}; expected one object a line")
        found.append((number, value))
    return found


def named_caption(row: Mapping[str, Any]) -> Any:
    """The value of the first of CAPTION_KEYS that a JSON object has and that is not null; None without any."""
    return next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), None)


def caption_text(value: Any, where: str) -> str:
    """A caption without surrounding spaces; the first one, if an image has a list of them.

    Raises:
        DataError: the value is not text, is empty, or cannot be written as UTF-8.
    """
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise DataError(f"{where}: {str(value)[:40]!r} is no text; expected a caption, or a list of captions")
    text = value.strip()
    if not text:
        raise DataError(f"{where}: empty; expected a caption")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise DataError(f"{where}: {text[:40]!a} is not UTF-8; write the caption anew") from error
    return text


def all_or_none(
    captions: Sequence[str | None], image: Callable[[int], str], strays: Sequence[str], where: str
) -> list[str] | None:
    """The captions of all images, or None if no image has one.

    Args:
        captions: one for each image, None where there is none.
        image: its name.
        strays: names of captions that have no image. They are an error only if some images have captions: in a folder
            without captions, a README.txt is just a text file.
        where: the data set's name, for messages.

    Raises:
        DataError: some images have no caption, or some captions have no image.
    """
    missing = [row for row, caption in enumerate(captions) if caption is None]
    if len(missing) == len(captions):
        return None
    if missing:
        raise DataError(
            f"{where}: images without a caption: {len(missing)} of {len(captions)}, the first is {image(missing[0])}; "
            "caption all of them, or remove those without"
        )
    if strays:
        raise DataError(
            f"{where}: captions without an image: {len(strays)}, the first is {strays[0]!r}; add their images, or "
            "remove what is no caption"
        )
    return [caption for caption in captions if caption is not None]


def distinct(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """(each caption once, in the order in which they first occur; int64 [len(captions)]: the number of each row's)."""
    places: dict[str, int] = {}
    index = [places.setdefault(caption, len(places)) for caption in captions]
    return list(places), torch.tensor(index, dtype=torch.long)


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1

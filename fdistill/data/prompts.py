"""Lists of prompts: a .txt file with one a line, or a .jsonl file with one object a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fdistill.base.errors import DataError
from fdistill.base.reading import not_here, read_bounded, reason_of
from fdistill.data.captions import (
    CAPTION_KEYS,
    caption_text,
    check_no_gaps,
    json_lines,
    named_caption,
    text_lines,
)

_FILE = "file_name"


@dataclass(frozen=True)
class PromptList:
    """A file of prompts.

    Attributes:
        prompts: at least one, in the order of the file.
        files: for each prompt the image that it is of, where the lines of a .jsonl file say so ("file_name"); None
            where they do not.
    """

    prompts: list[str]
    files: list[str] | None = None


def read_prompts(path: Path) -> list[str]:
    """The prompts of `read_prompt_list`."""
    return read_prompt_list(path).prompts


def read_prompt_list(path: Path) -> PromptList:
    """The prompts of a file, at least one, in its order; repeated ones stay repeated.

    The file is in UTF-8, with or without a byte order mark, and its lines end in LF or CRLF. An object in a .jsonl file
    has its prompt under "caption", "text" or "prompt"; the first of these counts.

    Raises:
        DataError: there is no such file, it is of another kind, holds no prompts or is not UTF-8, or a line holds none,
            even a blank one, unless it is at the end; or only some lines have a file name. The message has the line's
            number.
    """
    where = f"prompts {path}"
    special = not_here(path, "")
    if special:
        raise DataError(f"{where}: {special}; expected a file of prompts")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise DataError(f"{where}: expected a .txt file with one prompt a line, or a .jsonl file")
    try:
        content = read_bounded(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be read ({reason_of(error)}); expected a file of prompts") from error
    files: list[str] | None = None
    if path.suffix.lower() == ".txt":
        lines = text_lines(content, where)
        prompts = [line for _, line in lines]
        numbers = [number for number, _ in lines]
    else:
        rows = json_lines(content, where)
        prompts = [_prompt(row, f"{where}, line {number}") for number, row in rows]
        numbers = [number for number, _ in rows]
        files = _files(rows, where)
    if not prompts:
        raise DataError(f"{where}: empty; expected at least one prompt")
    check_no_gaps(numbers, where)
    return PromptList(prompts, files)


def _files(rows: list[tuple[int, dict[str, object]]], where: str) -> list[str] | None:
    """The file name in each object; None if none has one."""
    named = [row.get(_FILE) for _, row in rows]
    if all(name is None for name in named):
        return None
    for (number, _), name in zip(rows, named, strict=True):
        if not isinstance(name, str) or not name:
            raise DataError(
                f'{where}, line {number}: no "{_FILE}", and other lines have one; expected it in all or none'
            )
    return [str(name) for name in named]


def _prompt(row: dict[str, object], where: str) -> str:
    value = named_caption(row)
    if value is None:
        expected = " or ".join(f'"{key}"' for key in CAPTION_KEYS)
        raise DataError(f"{where}: an object with {', '.join(map(repr, row)) or 'no keys'}; expected {expected}")
    return caption_text(value, where)

"""Lists of prompts: a .txt file with one a line, or a .jsonl file with one object a line."""

from __future__ import annotations

from pathlib import Path

from fdistill.base.errors import DataError
from fdistill.data.captions import CAPTION_KEYS, caption_text, json_lines, named_caption, text_lines


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, at least one, in its order; repeated ones stay repeated.

    The file is in UTF-8, with or without a byte order mark, and its lines end in LF or CRLF; blank lines are skipped.
    An object in a .jsonl file has its prompt under "caption", "text" or "prompt"; the first of these counts.

    Raises:
        DataError: there is no such file, it is of another kind, holds no prompts or is not UTF-8, or a line holds none
            (the message has its number).
    """
    where = f"prompts {path}"
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise DataError(f"{where}: expected a .txt file with one prompt a line, or a .jsonl file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); expected a file of prompts") from error
    if path.suffix.lower() == ".txt":
        prompts = [line for _, line in text_lines(content, where)]
    else:
        prompts = [_prompt(row, f"{where}, line {number}") for number, row in json_lines(content, where)]
    if not prompts:
        raise DataError(f"{where}: empty; expected at least one prompt")
    return prompts


def _prompt(row: dict[str, object], where: str) -> str:
    value = named_caption(row)
    if value is None:
        expected = " or ".join(f'"{key}"' for key in CAPTION_KEYS)
        raise DataError(f"{where}: an object with {', '.join(map(repr, row)) or 'no keys'}; expected {expected}")
    return caption_text(value, where)

"""Lists of prompts: a .txt file with one a line, or a .jsonl file with one object a line."""

from __future__ import annotations

from pathlib import Path

from fdistill.base.errors import DataError
from fdistill.data.captions import CAPTION_KEYS, caption_text, json_lines, named_caption, text_lines


def read_prompts(path: Path) -> list[str]:
    """At least one prompt, in the order of the file, repeated ones as often as they are there.

    UTF-8, with or without a byte order mark, lines that end in LF or CRLF; blank lines are skipped. Of an object in a
    .jsonl file, the first of "caption", "text" and "prompt" that it has.

    Raises:
        DataError: no such file, another kind of file, no prompts in it, not UTF-8, or a line that holds none, with its
            number.
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

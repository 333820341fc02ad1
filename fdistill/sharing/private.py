"""Paths of the user's disk in values and texts that are published: the last name of each is all that stays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_LONGEST = 1024  # above what file systems take for a path
#: An absolute path, or one from the home folder, inside a text; "https://", "</b>" and "images/s" hold none.
_ABSOLUTE = re.compile(r"""(?<![\w:/.<~\\-])(?:~/|/(?=[\w.])|[A-Za-z]:[\\/](?=\w))[^\s'"`|,;()\[\]{}<>]*""")


def located(name: str, near: Path) -> Path | None:
    """Where a path leads that may have been written for another current folder: this one, `near`, or one above it."""
    if not name or len(name) > _LONGEST or "\0" in name:
        return None
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    for base in (Path.cwd(), near, *near.resolve().parents):
        try:
            if (base / path).exists():
                return base / path
        except OSError:  # a part of the path is longer than names may be
            return None
    return None


def is_private(text: str, near: Path) -> bool:
    """Whether a text is a path of the user's disk: absolute, from here, or of something that is there."""
    if text.startswith(("/", "~/", "./", "../")):
        return len(text) > 1 and "\n" not in text
    windows = PureWindowsPath(text)
    return windows.is_absolute() or ("/" in text and located(text, near) is not None)


def private_texts(value: Any, near: Path) -> dict[str, str]:
    """{text: what it becomes} for each text in a JSON value that is or holds a path of the user's disk."""
    found = {}
    for text, is_key in _texts(value):
        if not is_key and is_private(text, near):
            found[text] = _last(text)
        elif (cleaned := public_text(text, near)) != text:
            found[text] = cleaned
    return found


def public_name(text: str, near: Path) -> str:
    """A text that is a name, a path, or a sentence with one in it, without the folders of paths."""
    return private_texts(text, near).get(text, text)


def replaced(value: Any, texts: Mapping[str, str]) -> Any:
    """A JSON value with these texts replaced, in keys too."""
    if isinstance(value, dict):
        return {texts.get(key, key): replaced(one, texts) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [replaced(one, texts) for one in value]
    return texts.get(value, value) if isinstance(value, str) else value


def public_text(text: str, near: Path, texts: Mapping[str, str] | None = None) -> str:
    """A text without paths of the user's disk.

    Args:
        near: the student's folder, whose own path is known with the blanks that it may have in it.
        texts: from `private_texts`, of values that the text repeats.
    """
    for old, new in sorted((texts or {}).items(), key=lambda pair: -len(pair[0])):
        text = new.join(re.split(rf"(?<![\w/]){re.escape(old)}(?![\w/])", text))
    for root in sorted({str(root) for root in _roots(near)}, key=len, reverse=True):
        text = text.replace(f"{root}/", "/").replace(root, Path(root).name)
    return _ABSOLUTE.sub(_shortened, text)


def _roots(near: Path) -> Iterator[Path]:
    """Folders whose paths say whose disk this is: not those right below the root, such as /home."""
    for path in (near.absolute(), near.resolve(), Path.cwd(), Path.home()):
        yield from (folder for folder in (path, *path.parents) if len(folder.parts) > 2)


def _shortened(match: re.Match[str]) -> str:
    path = match.group()
    is_word = path.count("/") == 1 and path.startswith("/") and not Path(path).exists()  # "and /or" is no path
    return path if is_word else _last(path)


def _last(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]+" if "\\" in path else "/+", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else "folder"


def _texts(value: Any) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a key) for each text in a JSON value."""
    if isinstance(value, str):
        yield value, False
    elif isinstance(value, dict):
        for key, one in value.items():
            yield str(key), True
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)

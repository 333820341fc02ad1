"""The worked examples of docs/extending.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(heading: str) -> list[str]:
    """The Python code under a heading of the page, in order."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    found = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert found, heading
    return found


def run(code: str, folder: Path) -> None:
    """Writes a block that begins with the name of a file, and runs any other."""
    name = re.match(r"# file: (\S+)\n", code)
    if name:
        (folder / name[1]).write_text(code, encoding="utf-8")
    else:
        exec(compile(code, "docs/extending.md", "exec"), {})

"""Every Python block of the README runs as it stands there; by day, for fewer iterations."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.thorough import at_night

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = dict(
    zip(("distil", "without-fdistill", "own-loop"), re.findall(r"```python\n(.*?)```", README, re.DOTALL), strict=True)
)
LONG = "iterations=20"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all blocks run, one after the other, because later ones read what earlier ones write."""
    return tmp_path_factory.mktemp("readme")


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 3
    assert LONG in BLOCKS["distil"]


# By day, tests/students/test_cards.py runs students without fdistill, and tests/step every update.
@pytest.mark.parametrize("name", at_night(BLOCKS, lambda name: name != "distil"))
def test_a_python_example_runs(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    by_day = request.config.getoption("markexpr") == "not thorough"
    block = BLOCKS[name].replace(LONG, "iterations=2") if by_day else BLOCKS[name]
    done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

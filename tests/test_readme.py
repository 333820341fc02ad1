"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fdistill.config.reading import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith("#")
]


def test_there_are_two_examples_of_ten_and_twenty_lines() -> None:
    lengths = [len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS]
    assert len(lengths) == 2
    assert lengths[0] <= 10
    assert lengths[1] <= 20


@pytest.mark.parametrize("block", BLOCKS, ids=["use", "own-loop"])
def test_python_examples_run(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_commands_name_things_that_exist() -> None:
    assert COMMANDS
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), line
        elif words[:2] == ["fdistill", "distill"]:
            names = [word for word in words[2 : words.index("--output")] if "=" not in word]
            load_config(names[0], [word for word in words if "=" in word])
        else:
            assert words[0] in ("fdistill", "tensorboard", "accelerate"), line


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


DOCS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]


def anchors(path: Path) -> set[str]:
    """What its headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_documents_name_things_that_exist(path: Path) -> None:
    text = path.read_text()
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#)?([^)]*)\)", text):
        if not target.startswith("http"):
            linked = path if not target else (path.parent / target)
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    for script in re.findall(r"scripts/\w+\.(?:py|sh)", text):
        assert (ROOT / script).is_file(), script


def test_configs_say_what_they_reach() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert re.search(r"^# Reach: .*\d", path.read_text(), re.MULTILINE), path

"""Code blocks of the docs: Python runs as it stands there, YAML loads, and what does neither says why.

What is typed into a shell is parsed by the commands' own parser (tests/test_docs.py); `SHELL` says who runs it, or why
nobody does.

A Python block follows `<!-- not run: REASON -->`, or `<!-- run by tests/FILE.py -->` if another test takes it from the
page. All others run here, those of one page one after the other in one process: later ones read what earlier ones
write.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fdistill.config.reading import load_config

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n+)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Their blocks take longer than a daily run has for them.
SLOW = {"reading-a-run.md", "recipes.md", "tutorial.md"}
#: Languages of blocks that are not code for Python: what is typed, and what is printed.
OTHERS = {"bash", ""}
#: Pages with commands for a shell: the script that runs them, or why they are not run.
SHELL = {
    "scripts/newcomer.sh": ["first-hour.md"],
    "scripts/quickstart.sh, or the same with other names": ["index.md", "tutorial.md", "reading-a-run.md"],
    "minutes to hours each; what they printed stands on the page": [
        *("choosing-a-divergence.md", "convergence.md", "failures.md", "fields.md", "few-step.md", "methods/README.md"),
        *("methods/regression.md", "modes.md", "results.md", "rounding.md", "scaling.md", "speed.md"),
    ],
    "needs a published checkpoint, or images and prompts of a reader's own": [
        *("data.md", "evaluation.md", "fast-lora.md", "memory.md", "own-checkpoint.md", "recipes.md", "runs.md"),
        *("sharing.md", "stages.md", "teachers.md", "text-to-image.md"),
    ],
    "needs a GPU, several machines or a night": ["cifar10.md", "cluster.md", "kernels.md", "reliability.md"],
}


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    """(mark, code) of every block in a language."""
    return [(mark, code) for mark, found, code in BLOCK.findall(path.read_text(encoding="utf-8")) if found == language]


def run_here(path: Path) -> list[str]:
    return [code for mark, code in blocks(path, "python") if not mark.startswith(("not run: ", "run by "))]


RUN = [path for path in PAGES if run_here(path)]
YAML = [
    pytest.param(code, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, (_, code) in enumerate(blocks(path, "yaml"))
    if "--8<--" not in code  # a preset, as it is in configs/
]


def test_there_are_examples() -> None:
    assert {"tutorial.md", "reading-a-run.md", "teachers.md"} <= {path.name for path in RUN}
    assert len(YAML) >= 5


def test_languages_are_known() -> None:
    found = {language for path in PAGES for _, language, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
    assert found == {"python", "yaml", *OTHERS}


def test_of_every_command_it_is_said_who_runs_it_or_why_nobody_does() -> None:
    typed = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES if blocks(path, "bash")]
    assert sorted(page for pages in SHELL.values() for page in pages) == sorted(typed)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_marks_give_a_reason_or_a_test(path: Path) -> None:
    for mark, _ in blocks(path, "python"):
        if mark.startswith("run by "):
            by = ROOT / mark.removeprefix("run by ")
            assert by.is_file(), mark
            text = by.read_text(encoding="utf-8")
            assert path.name in text or f"support.{path.stem}" in text, f"{mark}: nothing of {path.name} there"
        elif mark.startswith("not run"):
            assert re.fullmatch(r"not run: \w.{15,}", mark), f"{mark}: say why"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.name, marks=[pytest.mark.thorough] * (path.name in SLOW)) for path in RUN],
)
def test_python_blocks_of_a_page_run(path: Path, tmp_path: Path) -> None:
    script = "\n".join(run_here(path))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", YAML)
def test_a_yaml_block_loads(code: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(code, encoding="utf-8")
    load_config(str(path))


def test_a_block_without_a_mark_is_found() -> None:
    text = (
        "<!-- not run: it is only an example -->\n```python\na\n```\n\nText\n\n```python\nb\n```\n```yaml\nc: 1\n```\n"
    )
    assert BLOCK.findall(text) == [
        ("not run: it is only an example", "python", "a\n"),
        ("", "python", "b\n"),
        ("", "yaml", "c: 1\n"),
    ]

"""The house stays one in which people find their way: short functions and files, few parameters, no torch for help."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "fdistill").rglob("*.py"), *(ROOT / "evaluation").rglob("*.py")])

#: What users call, with a keyword for everything that they may choose.
ENTRY_POINTS = {
    "fdistill/generation/generate.py:generate",
    "fdistill/step/critic.py:critic_step",
    "fdistill/step/implicit.py:sid_step",
    "fdistill/step/implicit.py:uni_instruct_step",
    "fdistill/step/matching.py:generator_step",
    "fdistill/students/tiue_pipeline.py:__call__",
    "fdistill/training/cache.py:cache",
    "evaluation/evaluate.py:evaluate",
}
#: commands/: options of the command line. kernels/: torch's operator schemas and Triton know no dataclasses.
#: networks/: a constructor's parameters are the keys of published config files.
FLAT = ("fdistill/commands/", "fdistill/kernels/", "fdistill/networks/")


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


FUNCTIONS = [found for path in FILES for found in functions(path)]


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first statement to the last, the docstring apart."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in given if argument.arg not in ("self", "cls")])


def test_functions_fit_on_a_screen() -> None:
    assert {name: lines(node) for name, node in FUNCTIONS if lines(node) > 60} == {}


def test_functions_take_at_most_eight_parameters() -> None:
    many = {name: parameters(node) for name, node in FUNCTIONS if parameters(node) > 8}
    assert {name: count for name, count in many.items() if name not in ENTRY_POINTS and not name.startswith(FLAT)} == {}
    assert many.keys() >= ENTRY_POINTS, "an entry point that has become short needs no exception"


def test_files_are_short_or_explained() -> None:
    explained = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    long = {path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert {path.name for path in long if path.name not in explained} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["evaluate", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fdistill.commands.cli import app\n"
        f"try:\n    app({arguments!r})\n"
        "except SystemExit as stopped:\n    assert not stopped.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout

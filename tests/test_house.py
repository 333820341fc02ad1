"""The house stays one in which people find their way: short functions and files, few parameters, no torch for help."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdistill.commands.cli import app

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "fdistill").rglob("*.py"), *(ROOT / "evaluation").rglob("*.py")])
TESTS_AND_SCRIPTS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

#: What users call, with a keyword for everything that they may choose.
ENTRY_POINTS = {
    "fdistill/generation/generate.py:generate",
    "fdistill/kernels/renoise.py:renoise_seeded",
    "fdistill/step/critic.py:critic_step",
    "fdistill/step/diffratio.py:ratio_critic_step",
    "fdistill/step/implicit.py:sid_step",
    "fdistill/step/implicit.py:uni_instruct_step",
    "fdistill/step/matching.py:generator_step",
    "fdistill/students/tiue_pipeline.py:__call__",
    "fdistill/training/cache.py:cache",
    "evaluation/evaluate.py:evaluate",
}
COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


FUNCTIONS = [found for path in FILES for found in functions(path)]


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first statement to the last, without signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in given if argument.arg not in ("self", "cls")])


def test_functions_fit_on_a_screen() -> None:
    assert {name: lines(node) for name, node in FUNCTIONS if lines(node) > 60} == {}


def is_flat(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether its parameters are given from outside, one by one.

    Options of a command; what torch's operator schemas and Triton take, which know no dataclasses, and what both
    backends of an operator therefore share; and the keys of published config files (constructors in networks/).
    """
    path, _, function = name.partition(":")
    _, room, *rest = path.split("/")
    if room == "kernels":
        decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
        backends = [f"fdistill/kernels/{backend}/{rest[-1]}:{function}" for backend in ("reference", "triton")]
        shared = path != f"fdistill/kernels/{rest[-1]}" and {*backends} <= {other for other, _ in FUNCTIONS}
        return shared or re.search(r"custom_op|register_fake|triton\.jit", decorators) is not None
    return (room == "commands" and function in COMMANDS) or (room == "networks" and function == "__init__")


def test_functions_take_at_most_eight_parameters() -> None:
    many = {name: parameters(node) for name, node in FUNCTIONS if parameters(node) > 8 and not is_flat(name, node)}
    assert {name: count for name, count in many.items() if name not in ENTRY_POINTS} == {}
    assert many.keys() >= ENTRY_POINTS, "an entry point that has become short needs no exception"


def test_files_are_short_or_explained() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"^- Files above 400 lines.*?(?=^- |\Z)", text, re.MULTILINE | re.DOTALL)
    explained = set(re.findall(r"`([\w/]+\.py)`", paragraph)) - {"tests/test_house.py"}
    files = [*FILES, *TESTS_AND_SCRIPTS]
    long = {path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert {path.relative_to(ROOT).as_posix() for path in long} == explained


def test_help_takes_little_time() -> None:
    """Of the processor, since other programs may share the machine; the best of ten."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "fdistill", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(10)) <= 0.3


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

"""Imports point downward between rooms and never run in a circle; evaluation is called from two places alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: The modules that stand at the top of fdistill/: the method. They import one another, without a circle.
METHOD = "the method"
BELOW_TEACHERS = {"base", "assets", "kernels", METHOD, "networks", "formats", "adapters"}
#: A folder of fdistill/ -> the folders that its modules may import. What is not here may not be imported.
MAY_IMPORT = {
    "base": set(),
    "assets": set(),
    "kernels": {"base"},
    METHOD: {"base", "kernels"},
    "networks": {"base"},
    "preference": {"base"},
    "config": {"base", METHOD},
    "step": {"base", "kernels", METHOD},
    "data": {"base", "assets", "kernels", METHOD},
    "adapters": {"base", "assets", "kernels", METHOD, "networks"},
    # A family of networks says what its publisher calls the tensors that files of other programs hold.
    "formats": {"base", "adapters"},
    "teachers": BELOW_TEACHERS,
    "students": BELOW_TEACHERS | {"teachers"},
    # What is published of a student, and its scores and settings.
    "sharing": BELOW_TEACHERS | {"students", "config"},
    "generation": BELOW_TEACHERS | {"teachers", "students"},
    "training": BELOW_TEACHERS | {"preference", "teachers", "students", "generation", "config", "data", "step"},
    "planning": BELOW_TEACHERS | {"teachers", "students", "generation", "config", "data", "step", "training"},
    "report": {"base", METHOD, "config", "training"},
    "commands": BELOW_TEACHERS
    | {"teachers", "students", "sharing", "generation", "config", "data", "step", "training", "planning", "report"},
    "evaluation": {"base", "assets", METHOD, "data", "adapters", "formats", "preference"}
    | {"teachers", "students", "generation"},
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, for types as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for name in ("fdistill", "evaluation") for path in sorted((ROOT / name).rglob("*.py"))}
#: fdistill/__init__.py names what users import from everywhere, and __main__.py runs the command.
ENTRANCES = {"fdistill", "fdistill.__main__"}
ROOMS = {name: path for name, path in FILES.items() if name not in ENTRANCES}


def room(module: str) -> str:
    """fdistill.kernels.reference.matching -> kernels; fdistill.ratio -> the method."""
    package, _, rest = module.partition(".")
    if package == "evaluation":
        return package
    first = rest.split(".")[0]
    return first if (ROOT / "fdistill" / first).is_dir() else METHOD


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports."""
    return (imports(path) & FILES.keys()) - {"evaluation"} - ENTRANCES


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_downward(name: str) -> None:
    own = room(name)
    assert own in MAY_IMPORT, f"{name}: the folder {own} has no place yet; name it in MAY_IMPORT"
    for other in imported(ROOMS[name]):
        if other.startswith("evaluation"):
            continue
        assert room(other) in MAY_IMPORT[own] | {own}, f"{name} imports {other}, which stands above {own}"


def test_no_module_imports_itself_in_a_circle() -> None:
    """A package counts as its __init__.py; a module does not import the package it stands in by being there."""
    graph = {name: imported(path) - {name} for name, path in ROOMS.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_commands_and_the_loop_call_evaluation() -> None:
    callers = {name for name, path in FILES.items() if any(other.startswith("evaluation") for other in imports(path))}
    assert {name for name in callers if not name.startswith("evaluation")} <= {
        "fdistill.commands.evaluation",
        "fdistill.training.loop",
    }


def test_the_method_stands_at_the_top() -> None:
    """And nothing else does: another concern is a folder whose name says it."""
    top = {path.stem for path in (ROOT / "fdistill").glob("*.py") if not path.stem.startswith("__")}
    assert len(top) <= 16
    assert {name.removeprefix("fdistill.") for name in ROOMS if room(name) == METHOD} == top


@pytest.mark.parametrize(
    "name", ["config.reading", "config.combinations", "methods", "student_kinds", "base.errors", "commands.cli"]
)
def test_configs_and_the_command_line_need_no_torch(name: str) -> None:
    code = f"import sys, fdistill.{name}\nassert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

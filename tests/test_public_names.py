"""What may be imported from outside: names in `__all__`, of `fdistill` and of the modules that the docs import from."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fdistill

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def modules() -> Iterator[str]:
    """Modules with an `__all__`."""
    for path in (path for package in ("fdistill", "evaluation") for path in sorted((ROOT / package).rglob("*.py"))):
        if re.search(r"^__all__ = ", path.read_text(), re.MULTILINE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__")


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every `from module import name` of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("fdistill", "evaluation"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def documented() -> set[tuple[str, str]]:
    blocks = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    return {found for block in blocks for found in imports(ast.parse(block))}


@pytest.mark.parametrize("module", modules())
def test_every_public_name_is_where_it_is_looked_for(module: str) -> None:
    """Those of `fdistill` are imported on first use, so that nothing else would look them up."""
    loaded = importlib.import_module(module)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
    assert len(set(loaded.__all__)) == len(loaded.__all__)


def test_type_checkers_see_the_names_that_are_imported_on_first_use() -> None:
    tree = ast.parse(Path(fdistill.__file__).read_text())
    (block, *_) = (node for node in tree.body if isinstance(node, ast.If))
    assert {name: module for module, name in imports(block)} == {
        name: f"fdistill.{module}" for name, module in fdistill._WHERE.items()
    }


@pytest.mark.parametrize(("module", "name"), sorted(documented()), ids=".".join)
def test_the_docs_import_public_names_alone(module: str, name: str) -> None:
    """Or else docs/compatibility.md would promise nothing about them."""
    loaded = importlib.import_module(module)
    found = getattr(loaded, name, None)
    assert name in getattr(loaded, "__all__", ()) or hasattr(found, "__all__")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        fdistill.distil  # noqa: B018

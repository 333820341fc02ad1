"""The documentation as a site: it builds without a warning, opens offline, and says what the code says."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fdistill
from evaluation.compare import compare
from evaluation.evaluate import evaluate
from evaluation.make_reference import make_reference
from fdistill.config.reading import load_config

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import make_failures
import settings_table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TOOLS = ("mkdocs", "material", "mkdocstrings")
#: A section of docs/moving.md, and the method that its settings are for.
METHODS = {"From FastGen": "f-distill", "From DMD2": "dmd2", "From SiD": "sid"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_it_builds_without_a_warning(site: Path) -> None:
    assert (site / "index.html").is_file()
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert {page.parent / "index" if page.name == "README" else page for page in pages} <= built


def test_nothing_is_fetched_from_other_hosts(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
    )
    for path in site.rglob("*.html"):
        assert not loads.search(path.read_text(encoding="utf-8")), path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\([\"']?|@import\s+[\"'])(?:https?:)?//", path.read_text(encoding="utf-8")), (
            path.name
        )


def test_search_works_in_pages_that_are_files(site: Path) -> None:
    assert (site / "search" / "search_index.js").is_file()
    assert "site/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    names = [f"fdistill.{name}" for name in fdistill.__all__ if name != "__version__"]
    names += ["evaluation.evaluate.evaluate", "evaluation.compare.compare", "evaluation.make_reference.make_reference"]
    assert [name for name in names if f'id="{name}"' not in pages] == []


def arguments_of(docstring: str) -> list[str]:
    """The names under "Args:"; a line may describe several."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^ {4}(\S[^:\n]*):", section[1], re.MULTILINE) if section else []
    return [name.strip().lstrip("*") for line in lines for name in line.split(",")]


def documented() -> Iterator[Any]:
    named = [getattr(fdistill, name) for name in fdistill.__all__ if name != "__version__"]
    for thing in (*named, evaluate, compare, make_reference):
        methods = (
            [member for member in vars(thing).values() if inspect.isfunction(member)] if inspect.isclass(thing) else []
        )
        yield from (each for each in (thing, *methods) if each.__doc__)


@pytest.mark.parametrize("thing", documented(), ids=lambda thing: thing.__qualname__)
def test_documented_arguments_exist(thing: Any) -> None:
    called = thing.__init__ if inspect.isclass(thing) else thing
    assert set(arguments_of(inspect.getdoc(thing) or "")) <= set(inspect.signature(called).parameters)


def test_the_page_of_settings_is_what_the_script_prints() -> None:
    assert (DOCS / "api" / "settings.md").read_text(encoding="utf-8") == settings_table.page()


def test_every_preset_is_shown() -> None:
    shown = re.findall(
        r'^### (\S+)\n\n```yaml\n--8<-- "configs/(\S+)\.yaml"$', (DOCS / "presets.md").read_text(), re.MULTILINE
    )
    assert all(heading == name for heading, name in shown)
    assert sorted(name for _, name in shown) == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def rows_of_moving() -> list[Any]:
    text = (DOCS / "moving.md").read_text(encoding="utf-8")
    found = []
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
        for theirs, ours in (row[:2] for row in rows[1:]):
            name = f"{heading.split()[-1]}-{re.sub(r'[^a-z0-9]+', '-', theirs.lower())[:40]}"
            found.append(pytest.param(METHODS[heading], ours.rstrip(" |"), id=name))
    return found


def test_these_tests_find_what_they_look_for() -> None:
    """A pattern that matches nothing would let everything pass."""
    assert len(rows_of_moving()) > 45
    assert sum(bool(arguments_of(inspect.getdoc(thing) or "")) for thing in documented()) > 25
    assert arguments_of(
        "One.\n\nArgs:\n    a, b: two\n        lines: of it\n    **c: more\n\nReturns:\n    d: e\n"
    ) == [
        "a",
        "b",
        "c",
    ]


@pytest.mark.parametrize(("method", "ours"), rows_of_moving())
def test_settings_of_the_moving_page_load(method: str, ours: str, tmp_path: Path) -> None:
    settings = re.findall(r"`([^`]+)`", ours)
    assert (ours.strip() == "-") == (not settings)
    path = tmp_path / "config.yaml"
    path.write_text(f"method: {method}\n", encoding="utf-8")
    loaded = load_config(str(path), settings)
    assert loaded.method == method


def test_pictures_of_failures_are_small_and_shown() -> None:
    folder, page = DOCS / "failures", (DOCS / "failures.md").read_text(encoding="utf-8")
    found = json.loads((folder / "failures.json").read_text(encoding="utf-8"))
    assert found["runs"].keys() == make_failures.RUNS.keys()
    for name, run in found["runs"].items():
        assert run["settings"] == make_failures.RUNS[name]
        load_config(make_failures.preset(name), run["settings"])
        assert all(f"`{setting}`" in page for setting in run["settings"]), name
        shown = [path.stem for path in folder.glob("*.png")]
        assert (name in shown) == (f"(failures/{name}.png)" in page)
        assert (name in shown) == (name not in make_failures.HEALTHY.values() and not run["error"])
    assert all(path.stat().st_size < 80_000 for path in folder.glob("*.png"))

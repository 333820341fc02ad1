"""docs/tutorial.ipynb runs as it stands: by day its cells for few iterations, at night as Jupyter would start it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


def executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> NotebookNode:
    monkeypatch.setenv("TMPDIR", str(folder))
    notebook = nbformat.read(TUTORIAL, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


def printed(notebook: NotebookNode) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def scores(text: str) -> dict[str, tuple[float, float]]:
    """What the notebook prints: the name of a score -> the teacher's, the student's."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: (float(row[1]), float(row[2])) for row in rows if len(row) == 3}


def pictures(notebook: NotebookNode) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_it_is_committed_without_outputs_and_every_cell_is_explained() -> None:
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") - 1


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TUTORIAL_QUICK", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for cell in nbformat.read(TUTORIAL, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    found = scores(capsys.readouterr().out)
    assert {name.split("@")[0] for name in found} >= {"fd_digits", "precision", "recall", "class_accuracy"}
    assert names["images"][7].size == (8, 8)


@pytest.mark.thorough
def test_it_shows_a_student_that_draws_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUTORIAL_QUICK", raising=False)
    notebook = executed(tmp_path, monkeypatch)
    assert pictures(notebook) == 6
    found = scores(printed(notebook))
    (accuracy,) = (values for name, values in found.items() if name.startswith("class_accuracy"))
    assert min(accuracy) > 0.9

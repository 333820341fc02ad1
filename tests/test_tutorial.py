"""docs/tutorial.ipynb runs as it stands, in a process of its own as Jupyter would start it."""

from __future__ import annotations

from pathlib import Path

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


def scores(notebook: NotebookNode) -> dict[str, tuple[float, float]]:
    """What the notebook prints: the name of a score -> the teacher's, the student's."""
    text = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )
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


@pytest.mark.thorough  # half a minute
def test_it_runs_with_few_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTORIAL_QUICK", "1")
    notebook = executed(tmp_path, monkeypatch)
    assert pictures(notebook) == 6
    assert {name.split("@")[0] for name in scores(notebook)} >= {"fd_digits", "precision", "recall", "class_accuracy"}


@pytest.mark.thorough
def test_it_shows_a_student_that_draws_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUTORIAL_QUICK", raising=False)
    found = scores(executed(tmp_path, monkeypatch))
    (accuracy,) = (values for name, values in found.items() if name.startswith("class_accuracy"))
    assert min(accuracy) > 0.9

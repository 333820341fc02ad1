"""The study of few-step students: the config of every row loads, and kept scores become the table. No run starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import study_few_step
from study_few_step import METHODS, ROWS, TERMS, config

from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig


def loaded(row: str, folder: Path) -> DistillConfig:
    """From a file, as the study hands it to `fdistill distill`."""
    path = folder / f"{row}.yaml"
    path.write_text(json.dumps(config(row)), encoding="utf-8")
    return load_config(str(path))


def test_rows_are_all_methods_and_terms() -> None:
    assert len(set(ROWS)) == len(ROWS) == 4 * 2 * len(METHODS) + len(TERMS) + 2
    assert {row.partition("+")[2] for row in ROWS} == {"", *TERMS}


@pytest.mark.parametrize("row", ROWS)
def test_the_config_of_a_row_is_what_its_name_says(row: str, tmp_path: Path) -> None:
    found = loaded(row, tmp_path)
    name, _, term = row.partition("+")
    method, _, steps = name.removesuffix("-lora").rpartition("-")
    lora = name.endswith("-lora")
    assert found.method == method
    assert (found.student.steps, found.student_level) == ((None, 999.0) if steps == "1" else (int(steps), None))
    assert (found.student.lora_rank, found.fake_score.lora_rank) == ((32, 32) if lora else (0, 0))
    assert found.fake_score.lr == (1e-3 if lora else 2e-4)
    assert found.teacher == "digits-t2i"
    if term:
        assert found != loaded(name, tmp_path)
        for section, settings in TERMS[term].items():
            given: Any = getattr(found, section)
            assert (
                settings.items() <= given.model_dump().items() if isinstance(settings, dict) else given == settings
            ), section


def kept(folder: Path, name: str, **scores: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(scores), encoding="utf-8")


def test_the_table_is_made_of_kept_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("evaluate", "_run"):
        monkeypatch.setattr(study_few_step, name, lambda *_, **__: pytest.fail("measured or trained anew"))
    numbers = {
        "prompt_accuracy": 0.98,
        "fd_digits": 3.0,
        "fd_digits_spread": 0.1,
        "diversity_digits": 4.5,
        "milliseconds": 12.345,
    }
    kept(tmp_path, "teacher.json", **{**numbers, "prompt_accuracy": 1.0, "fd_digits": 2.0})
    for row in ("dmd2-4+any-step", "sid-2"):
        kept(tmp_path / row, "scores.json", **numbers)
        (tmp_path / row / "minutes.json").write_text("7.25")
    for steps in (1, 2):
        kept(tmp_path / "dmd2-4+any-step", f"scores-{steps}.json", **{**numbers, "fd_digits": 4.0 + steps})
    monkeypatch.setattr(sys, "argv", ["study", str(tmp_path), "--only", "sid-2,*+any-step", "seed=1"])
    study_few_step.main()
    assert capsys.readouterr().out.splitlines() == [
        "| row | prompt accuracy | fd_digits | times the teacher's | diversity | ms an image | minutes |",
        "|---|---|---|---|---|---|---|",
        "| `teacher` | 1.000 | 2.00 ± 0.10 | 1.00 | 4.50 | 12.3 |  |",
        "| `sid-2` | 0.980 | 3.00 ± 0.10 | 1.50 | 4.50 | 12.3 | 7.2 |",
        "| `dmd2-4+any-step` | 0.980 | 3.00 ± 0.10 | 1.50 | 4.50 | 12.3 | 7.2 |",
        "| `dmd2-4+any-step, 1 of its steps` | 0.980 | 5.00 ± 0.10 | 2.50 | 4.50 | 12.3 | 7.2 |",
        "| `dmd2-4+any-step, 2 of its steps` | 0.980 | 6.00 ± 0.10 | 3.00 | 4.50 | 12.3 | 7.2 |",
    ]
    written = json.loads((tmp_path / "few-step.json").read_text())
    assert written["sid-2"] == {**numbers, "minutes": 7.25}
    assert "minutes" not in written["teacher"]


def test_a_run_of_phases_hands_the_earlier_one_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase is a command of its own; the overrides go to all of them, and the minutes are kept."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command[4:])
        Path(command[-1]).mkdir()

    monkeypatch.setattr(study_few_step, "_run", run)
    row = "dmd2-4-lora+phases"
    assert study_few_step.distil(tmp_path, row, ["seed=1"]) == tmp_path / row
    first, last = str(tmp_path / f"{row}-1"), str(tmp_path / row)
    config_file = str(tmp_path / f"{row}.yaml")
    assert commands == [
        [config_file, "seed=1", "--output", first],
        [config_file, "seed=1", f"student.previous_phase={first}", "--output", last],
    ]
    study_few_step.distil(tmp_path, row, ["seed=1"])
    assert len(commands) == 2


def test_the_page_has_the_measured_scores() -> None:
    docs = Path(__file__).parents[2] / "docs"
    found = json.loads((docs / "few-step.json").read_text(encoding="utf-8"))
    page = (docs / "few-step.md").read_text(encoding="utf-8")
    assert "\n".join(study_few_step.table(found)) in page
    assert {row.partition(", ")[0] for row in found} == {"teacher", *ROWS}

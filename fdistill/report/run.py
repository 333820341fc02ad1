"""What a run's folder says, read for a report. Nothing in it is executed, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdistill.base.errors import CheckpointError
from fdistill.base.files import read_json_object
from fdistill.config.reading import dump_config, load_config
from fdistill.config.schema import DistillConfig
from fdistill.student_kinds import STUDENT_FILE
from fdistill.training.environment import RECORD as ENVIRONMENT
from fdistill.training.journal import read_records
from fdistill.training.read_data import RECORD as DATA

#: Of a run's folder: what `fdistill evaluate TEACHER --output FILE` wrote.
TEACHER_SCORES = "teacher.json"


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Attributes:
        name: what tells it from the other runs of a report.
        folder: as it was named.
        config: its settings.
        records: of training, oldest first.
        samples: {iteration: the file with the student's grid}, rising.
        beside: {"teacher", "data": the file with their grid}, those that are there.
        student: the student's file fdistill_student.json; {} before the run has ended.
        best: the same of the best student by score; {} without one.
        teacher_scores: {metric: the teacher's score} of a file `TEACHER_SCORES` in the folder; {} without one.
        data: what was read, as data.json says.
        environment: versions and hardware; {} of runs before 2026-11-30.
    """

    name: str
    folder: Path
    config: DistillConfig
    records: list[dict[str, Any]]
    samples: dict[int, Path]
    beside: dict[str, Path]
    student: Mapping[str, Any]
    best: Mapping[str, Any]
    teacher_scores: Mapping[str, float]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def iteration(self) -> int:
        """The last that was recorded; 0 before the first."""
        return int(self.records[-1]["iteration"]) if self.records else 0

    @property
    def settings(self) -> str:
        """All settings, as YAML."""
        return dump_config(self.config)


def read_scores(path: Path) -> dict[str, float]:
    """{metric: score} of a file of `fdistill evaluate`; raises CheckpointError if it is none."""
    try:
        return {name: float(value) for name, value in read_json_object(path)["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"scores {path}: cannot be read ({error!r}); expected the file that `fdistill evaluate TEACHER --output "
            "FILE` writes"
        ) from error


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads a run's folder.

    Raises:
        CheckpointError: there is no run, or its config.yaml is damaged.
        OutputError: its records are damaged.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"run {str(folder)!r}: has no config.yaml and metrics.jsonl; expected the folder that `fdistill distill` "
            "was given as --output, once its first record is written"
        )
    grids = {path.stem: path for path in sorted((folder / "samples").glob("*.png"))}
    return Run(
        name or folder.resolve().name,
        folder,
        load_config(str(folder / "config.yaml")),
        read_records(folder / "metrics.jsonl"),
        {int(stem): path for stem, path in grids.items() if stem.isdecimal()},
        {stem: grids[stem] for stem in ("teacher", "data") if stem in grids},
        _facts(folder / "student" / STUDENT_FILE),
        _facts(folder / "best" / STUDENT_FILE),
        read_scores(folder / TEACHER_SCORES) if (folder / TEACHER_SCORES).is_file() else {},
        _facts(folder / DATA),
        _facts(folder / ENVIRONMENT),
    )


def named_runs(folders: list[Path]) -> list[Run]:
    """The runs of some folders, named as these, and with their parents' names where two are alike."""
    names = [folder.resolve().name for folder in folders]
    alike = len(set(names)) < len(names)
    return [
        read_run(folder, f"{folder.resolve().parent.name}/{name}" if alike else name)
        for folder, name in zip(folders, names, strict=True)
    ]


def _facts(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it to do without it") from error

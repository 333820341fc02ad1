"""The table of terms and ways of training in docs/methods/README.md: it is complete, and the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fdistill.config import terms
from fdistill.config.schema import DistillConfig

ROOT = Path(__file__).parent.parent
HEADING = "## Terms and ways of training"
#: Settings of this kind that have no section of their own.
WAYS = (
    "fake_score.alignment",
    "generator.normaliser_floor",
    "student.any_step",
    "student.noise_kl_weight",
    "student.phases",
    "student.sampler",
    "student.simulated",
)


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the first table below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"{heading}\n")[1]
    lines = re.search(r"^\|.*\n\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1].splitlines()]


ROWS = table("docs/methods/README.md", HEADING)


def settings(cell: str) -> list[str]:
    return re.findall(r"`(\w+\.\w+)", cell)


def sections() -> list[str]:
    """The sections of a config that fdistill/config/terms.py describes."""
    kinds = {name: field.annotation for name, field in DistillConfig.model_fields.items()}
    return [name for name, kind in kinds.items() if getattr(kind, "__module__", "") == terms.__name__]


def test_every_term_has_a_row() -> None:
    found = [setting for row in ROWS for setting in settings(row[1])]
    assert {"regression", "segment"} <= set(sections())
    assert set(sections()) <= {setting.partition(".")[0] for setting in found}
    assert set(WAYS) <= set(found)


def test_a_term_for_few_steps_is_one_of_them() -> None:
    """docs/few-step.md says when to use a term; formulas and sources stand in one place."""
    found = {setting for row in table("docs/few-step.md", "## Terms that help") for setting in settings(row[0])}
    assert len(found) > 5
    known = {setting for row in ROWS for setting in settings(row[1])}
    assert found - {"augmentation.normaliser_floor"} <= known


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_a_formula_a_source_and_a_test(row: list[str]) -> None:
    _, _, formula, source, tests = row
    assert formula
    assert re.fullmatch(r"(\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/\2\)(, )?)+", source), source
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
    assert named, tests
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"

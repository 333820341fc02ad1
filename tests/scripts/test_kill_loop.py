"""Runs that are killed at random moments end as one that was never killed; the script's own loop, with three kills."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "kill_loop.py"


@pytest.mark.thorough
def test_three_kills(tiny_teacher: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("kill_loop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    report = script.kill_loop(3, tmp_path, {**script.settings_of(tiny_teacher, 4), "log.checkpoint_every": 1})
    assert report.differences == []
    assert sum(report.kills.values()) == 3
    assert report.kills[script.SAVED] + report.kills[script.EXPORTED] >= 1, "it kills while something is written"

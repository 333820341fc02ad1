"""Alarms: raised by what lasts, not by chance; in the records, and told once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fdistill.config.reading import load_config
from fdistill.training.alarms import alarms, drifts
from fdistill.training.build import build
from fdistill.training.journal import read_records
from fdistill.training.logbook import Logbook

HEALTHY = {"discriminator/accuracy": 0.7, "generator/clamped_ratios": 0.1, "fake_score/denoising": 1.0}


@pytest.mark.parametrize(
    ("changes", "name", "advised"),
    [
        ({"discriminator/accuracy": 0.99}, "discriminator saturated", "lower discriminator.lr"),
        ({"generator/clamped_ratios": 0.95}, "ratio collapse", "at least 95% of the density ratios"),
        ({"fake_score/denoising": 12.0}, "critic exploding", "12 times what it was; lower fake_score.lr"),
        ({"discriminator/gan_real": 11.0}, "critic exploding", "GAN loss is above 10; lower discriminator.lr"),
    ],
)
def test_what_lasts_raises_an_alarm(changes: dict[str, float], name: str, advised: str) -> None:
    odd = {**HEALTHY, **changes}
    found = alarms([HEALTHY] * 5 + [odd] * 3)
    assert list(found) == [name]
    assert advised in found[name]
    assert alarms([HEALTHY] * 5 + [odd, HEALTHY, odd]) == {}
    assert alarms([odd] * 2) == {}


def look(saturation: float = 0.3, contrast: float = 0.2, diversity: float = 0.25) -> dict[str, float]:
    own = {"samples/saturation": saturation, "samples/contrast": contrast, "samples/diversity": diversity}
    return own | {"samples/teacher_saturation": 0.3, "samples/teacher_contrast": 0.2, "samples/teacher_diversity": 0.25}


@pytest.mark.parametrize(
    ("looks", "name", "advised"),
    [
        ([look(), look(0.5), look(0.6)], "colours burnt", "saturation of samples stays above 1.67 times"),
        (
            [look(), look(contrast=0.31), look(contrast=0.4)],
            "colours burnt",
            "the contrast of samples stays above 1.55",
        ),
        ([look(diversity=0.2), look(diversity=0.09), look(diversity=0.08)], "samples alike", "0.36 times as much"),
    ],
)
def test_samples_that_drift_raise_an_alarm(looks: list[dict[str, float]], name: str, advised: str) -> None:
    found = drifts(looks)
    assert list(found) == [name]
    assert advised in found[name]
    assert drifts(looks[:2]) == {}, "once may be chance"


def test_samples_that_begin_alike_raise_none() -> None:
    assert drifts([look(diversity=0.05), look(diversity=0.1), look(diversity=0.15)]) == {}
    grey = {"samples/saturation": 0.009, "samples/teacher_saturation": 0.003}
    assert drifts([grey] * 4) == {}


def test_diversity_that_is_low_from_the_start_and_falls_is_collapse() -> None:
    """As of the run of docs/failures.md whose fake score jumps: it never had half of the teacher's diversity."""

    def alike(*beside_teacher: float) -> list[str]:
        return list(drifts([look(diversity=0.25 * share) for share in beside_teacher]))

    assert alike(0.36, 0.30, 0.25) == ["samples alike"]
    assert alike(0.36, 0.30) == []
    assert alike(0.6, 0.5, 0.45) == []
    assert alike(0.2, 0.19, 0.19) == []


def test_records_without_these_quantities_raise_none() -> None:
    assert alarms([{"iteration": i} for i in range(10)]) == {}
    assert alarms([{"fake_score/denoising": 1e-9 * 1.5**i} for i in range(10)]) == {}


def test_an_alarm_is_in_every_record_and_told_once(
    tiny_teacher: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Also of a run that goes on in another process."""
    changes = {"teacher": str(tiny_teacher), "device": "cpu", "log.tracker": "none", "log.samples_every": 0}
    run = build(load_config("digits", {**changes, "log.every": 1, "log.checkpoint_every": 0}), torch.device("cpu"))
    for accuracies in ([1.0, 1.0, 1.0, 1.0], [1.0, 0.5]):
        with Logbook(run, tmp_path, None, main=True) as logbook:
            for accuracy in accuracies:
                run.iteration += 1
                record: dict[str, Any] = {**HEALTHY, "discriminator/accuracy": accuracy}
                logbook.journal.record = lambda record=record: dict(record)  # type: ignore[method-assign]
                logbook.after_iteration([], stopping=False)
    told = [str(warning.message) for warning in recwarn.list if "saturated" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("iteration 3: discriminator saturated: its accuracy stays above 1")
    named = [record.get("alarms") for record in read_records(tmp_path / "metrics.jsonl")]
    assert named == [None, None, *([["discriminator saturated"]] * 3), None]

"""Alarms: raised by what lasts, not by chance; in the records, and told once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fdistill.config.reading import load_config
from fdistill.training.alarms import alarms
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

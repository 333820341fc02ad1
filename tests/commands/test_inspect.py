"""`fdistill inspect`: what it says, and that a checkpoint read wrongly is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fdistill import distill
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import DataError
from fdistill.commands.cli import app
from fdistill.commands.inspect import check_predictions, describe, inspect
from fdistill.noise import EDMSchedule, FlowSchedule
from support.denoisers import GaussianDenoiser
from support.families import FAMILIES


def test_the_digits_teacher_makes_sense_on_digits_and_on_its_own_samples() -> None:
    for data in ("digits", None):
        facts, checks = inspect("digits", data=data)
        assert len(checks) == 8
        assert all(check.makes_sense for check in checks)
        middle = checks[4]
        assert middle.error < 0.6 * middle.linear_error
    assert facts["condition"] == "10 classes, no label for `no class`"
    assert "x0-predictions agree with its own samples" in describe(facts, checks)
    assert "x0-predictions make sense" in describe(*inspect("digits", data="digits"))


WRONG: list[dict[str, object]] = [
    {"sigma_data": 0.1},
    {"_class_name": "EDMEulerScheduler"},
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    {"_class_name": "DDPMScheduler", "beta_schedule": "linear"},
    {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("change", WRONG)
def test_a_scheduler_that_is_not_the_networks_is_noticed(change: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(EMBEDDED_TEACHERS["digits"], folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    facts, checks = inspect(folder, data="digits")
    assert not all(check.makes_sense for check in checks)
    assert "x0-predictions are wrong at" in describe(facts, checks)


@pytest.mark.parametrize("schedule", [EDMSchedule(), FlowSchedule()])
def test_the_best_linear_denoiser_is_that_of_gaussian_data(schedule: EDMSchedule | FlowSchedule) -> None:
    torch.manual_seed(0)
    x0 = 0.3 + 0.6 * torch.randn(4096, 1, 1, 4)
    checks = check_predictions(GaussianDenoiser(0.3, 0.6, schedule, size=4), x0, None)
    for check in checks:
        assert check.error == pytest.approx(check.linear_error, rel=0.03)
        assert check.makes_sense
    assert not all(check.makes_sense for check in check_predictions(GaussianDenoiser(-0.3, 2.0, schedule, 4), x0, None))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_recognised(name: str, tmp_path: Path) -> None:
    write, exported = FAMILIES[name]
    result = CliRunner().invoke(app, ["inspect", str(write(tmp_path / "teacher"))])
    assert result.exit_code == 0, result.output
    assert f".{exported}\n" in result.output
    assert "x0-predictions" in result.output
    if name in ("dit", "sit", "edm2-latent"):
        assert "latents of an autoencoder, 2 pixels each way" in result.output


def test_students_and_runs_are_inspected_as_they_are(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {"teacher": str(tiny_teacher), "batch_size": 4, "iterations": 1, "null_class": 9, "data": None}
    distill("digits", output=tmp_path / "run", method="diff-instruct", **settings)
    for folder in (tmp_path / "run", tmp_path / "run" / "student"):
        facts, _ = inspect(folder)
        assert facts["condition"] == "9 classes, `no class` is 9"


def test_data_of_other_classes_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((12, 8, 8), np.uint8), labels=np.arange(12))
    np.savez(tmp_path / "b.npz", images=np.zeros((12, 8, 8), np.uint8))
    with pytest.raises(DataError, match="has 12 classes, but the checkpoint has 10"):
        inspect(tiny_teacher, data=str(tmp_path / "a.npz"))
    with pytest.raises(DataError, match="has no classes, but the checkpoint has 10"):
        inspect(tiny_teacher, data=str(tmp_path / "b.npz"))


def test_a_text_to_image_teacher_is_told_captions() -> None:
    facts, checks = inspect("digits-t2i", data="digit-captions", num_images=32)
    assert facts["condition"].startswith("prompts, as prompt_embeds")
    assert facts["student"].endswith("exported as diffusers.StableDiffusionPipeline")
    assert all(check.makes_sense for check in checks)
    # Told which digit to draw, it is far better than the best linear denoiser even where all is noise.
    assert checks[0].error < 0.7 * checks[0].linear_error

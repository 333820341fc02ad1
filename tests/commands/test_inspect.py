"""`fdistill inspect`: what it says, and that a checkpoint read wrongly is noticed."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fdistill import distill
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import ArgumentError, CheckpointError, DataError
from fdistill.commands.cli import app
from fdistill.commands.inspect import describe, describe_features, inspect
from fdistill.commands.predictions import LevelCheck, LinearDenoiser, check_predictions, relative_error
from fdistill.commands.readings import Subject, judge
from fdistill.noise import EDMSchedule, FlowSchedule
from support.denoisers import GaussianDenoiser
from support.families import FAMILIES
from support.text_families import RESOLUTION, TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.thorough import at_night

TEXT = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}


def test_the_digits_teacher_makes_sense_on_digits_and_on_its_own_samples() -> None:
    for data in ("digits", None):
        facts, checks, verdict = inspect("digits", data=data)
        assert len(checks) == 8
        assert all(check.makes_sense for check in checks)
        middle = checks[4]
        assert middle.error < 0.75 * middle.linear_error
        assert (verdict is None) == (data is None)
        assert verdict is None or verdict.likely is None
    assert facts["condition"] == "10 classes, no label for `no class`"
    assert "guidance" not in facts
    assert "x0-predictions agree with images that the checkpoint itself has made" in describe(facts, checks, verdict)
    text = describe(*inspect("digits", data="digits"))
    assert text.endswith("x0-predictions make sense")
    assert len(text.splitlines()) < 30


def edited(name: str, folder: Path, place: str, change: dict[str, object]) -> Path:
    """A copy of an embedded teacher with another config of its scheduler or autoencoder."""
    shutil.copytree(EMBEDDED_TEACHERS[name], folder)
    path = folder / place
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


SCHEDULER, VAE = "scheduler/scheduler_config.json", "vae/config.json"
#: A teacher, what is changed in it, and what has to be named as wrong.
WRONG: list[tuple[str, str, dict[str, object], str, str]] = [
    ("digits", SCHEDULER, {"sigma_data": 0.1}, "schedule", "sigma_data 0.7"),
    ("digits", SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "schedule", "CMStochasticIterativeScheduler"),
    ("digits", SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "prediction", "CMStochasticIterative"),
    ("digits", SCHEDULER, {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}, "schedule", "CMStochastic"),
    ("digits-t2i", SCHEDULER, {"prediction_type": "epsilon"}, "prediction type", "prediction_type v_prediction"),
    ("digits-t2i", SCHEDULER, {"prediction_type": "sample"}, "prediction type", "prediction_type v_prediction"),
    (
        "digits-t2i",
        SCHEDULER,
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        "schedule",
        "beta_schedule scaled_linear, beta_start 0.00085, beta_end 0.012",
    ),
    ("digits-t2i", VAE, {"scaling_factor": 0.18215}, "scale", "scaling_factor 0.9"),
    ("digits-t2i", VAE, {"scaling_factor": 2.0}, "scale", "scaling_factor 0.9"),
]
DATA = {"digits": "digits", "digits-t2i": "digit-captions"}


@pytest.mark.parametrize(
    ("name", "place", "change", "kind", "words"), at_night(WRONG, lambda wrong: WRONG.index(wrong) not in (0, 4))
)
def test_a_wrong_reading_is_noticed_and_named(
    name: str, place: str, change: dict[str, object], kind: str, words: str, tmp_path: Path
) -> None:
    folder = edited(name, tmp_path / "wrong", place, change)
    facts, checks, verdict = inspect(folder, data=DATA[name], num_images=8)
    assert verdict is not None
    assert verdict.likely is not None
    assert kind in verdict.likely.kind
    assert words in verdict.likely.change
    assert kind == verdict.likely.kind or name == "digits"
    text = describe(facts, checks, verdict)
    assert re.search(rf"likely wrong: .*{kind}.*; with .*{words}.* the error is 0\.\d\d of", text)
    if name == "digits" or "prediction_type" in change or "scaling_factor" in change:
        assert "x0-predictions are wrong at" in text


@pytest.mark.thorough  # by day, without an autoencoder
def test_the_other_range_of_pixels_is_noticed(tmp_path: Path) -> None:
    """An autoencoder for pixels in [0, 1], as EDM2's, which diffusers' config does not say."""
    folder = tmp_path / "teacher"
    shutil.copytree(EMBEDDED_TEACHERS["digits-t2i"], folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["encoder.conv_in.bias"] -= tensors["encoder.conv_in.weight"].sum(dim=(1, 2, 3))
    tensors["encoder.conv_in.weight"] *= 2  # on 2 x - 1
    tensors["decoder.conv_out.weight"] /= 2
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] / 2 + 0.5
    save_file(tensors, path, {"format": "pt"})
    facts, checks, verdict = inspect(folder, data="digit-captions", num_images=8)
    assert re.fullmatch(
        r"round trip \d+\.\d dB in \[-1, 1\] as it is read, \d+\.\d dB in \[0, 1\]; \[0, 1\] is better",
        facts["autoencoder"],
    )
    text = describe(facts, checks, verdict)
    assert "likely wrong: pixel range; with the autoencoder reads pixels in [0, 1] the error is" in text


def test_pixels_in_the_other_range_are_noticed_without_an_autoencoder() -> None:
    torch.manual_seed(0)
    x0 = 0.3 + 0.6 * torch.randn(16, 1, 1, 4)
    subject = Subject(GaussianDenoiser(0.65, 0.3, EDMSchedule(), size=4), None, None, x0, x0, None)
    verdict = judge(subject)
    assert verdict.likely is not None
    assert (verdict.likely.kind, verdict.likely.change) == ("pixel range", "pixels in [0, 1]")
    right = Subject(GaussianDenoiser(0.3, 0.6, EDMSchedule(), size=4), None, None, x0, x0, None)
    assert judge(right).likely is None


def test_an_untrained_network_fits_no_reading(tiny_teacher: Path) -> None:
    facts, checks, verdict = inspect(tiny_teacher, data="digits", num_images=8)
    assert verdict is not None
    assert verdict.likely is None
    assert re.search(r"wrong at \d of 8 levels\nno other reading fits, of 1\d tried", describe(facts, checks, verdict))


def test_where_a_good_network_amplifies_its_errors_it_is_not_judged() -> None:
    """The noise of DDPM's last timestep divided by its signal is 158: so are errors of x0 and of eps."""
    last, other = LevelCheck(999, 158.0, 2.0, 0.5, 0.5, 158.0), LevelCheck(500, 1.0, 0.4, 0.5, 0.5, 1.0)
    assert not last.judged
    assert last.makes_sense
    assert not LevelCheck(999, 158.0, math.nan, 0.5, 0.5, 158.0).makes_sense
    assert relative_error([last, other]) == pytest.approx(0.8)
    assert relative_error([LevelCheck(500, 1.0, math.nan, 0.5, 0.5)]) == math.inf
    assert "not judged: x0 amplifies the output 158 times" in describe({"checked on": "data"}, [last, other], None)


def test_the_best_linear_denoiser_knows_the_spectrum() -> None:
    """Of smooth images it leaves less than one that knows their mean and variance alone, and just what is left."""
    torch.manual_seed(0)
    spectrum = torch.zeros(2, 8, 8)
    spectrum[:, :2, :2] = 4.0
    white = torch.fft.fft2(torch.randn(4096, 2, 8, 8), norm="ortho")
    x0 = torch.fft.ifft2(white * spectrum.sqrt(), norm="ortho").real * 2**0.5  # half the power is in the real part
    even = (spectrum + spectrum.flip(1, 2).roll((1, 1), (1, 2))) / 2
    expected = (even * 0.25 / (even + 0.25)).mean().sqrt()
    found = LinearDenoiser(x0).error(1.0, 0.5)
    assert found == pytest.approx(float(expected), rel=0.02)
    variance = float(x0.var())
    assert found < 0.8 * (variance * 0.25 / (variance + 0.25)) ** 0.5
    common = x0[:, :1].repeat(1, 2, 1, 1)  # channels that are equal: half of the noise is told from them
    assert LinearDenoiser(common).error(1.0, 0.5) < 0.9 * LinearDenoiser(x0).error(1.0, 0.5)


@pytest.mark.parametrize("schedule", [EDMSchedule(), FlowSchedule()])
def test_the_best_linear_denoiser_is_that_of_gaussian_data(schedule: EDMSchedule | FlowSchedule) -> None:
    torch.manual_seed(0)
    x0 = 0.3 + 0.6 * torch.randn(4096, 1, 1, 4)
    checks = check_predictions(GaussianDenoiser(0.3, 0.6, schedule, size=4), x0, None)
    for check in checks:
        assert check.error == pytest.approx(check.linear_error, rel=0.03)
        assert check.makes_sense
    assert not all(check.makes_sense for check in check_predictions(GaussianDenoiser(-0.3, 2.0, schedule, 4), x0, None))


@pytest.mark.parametrize("name", at_night(FAMILIES, lambda name: name not in ("ddpm", "edm-ddpmpp", "dit")))
def test_every_family_is_recognised(name: str, tmp_path: Path) -> None:
    write, exported = FAMILIES[name]
    result = CliRunner().invoke(app, ["inspect", str(write(tmp_path / "teacher"))])
    assert result.exit_code == 0, result.output
    assert f".{exported}\n" in result.output
    assert "x0-predictions" in result.output
    if name in ("dit", "sit", "edm2-latent"):
        assert "latents of an autoencoder, 2 pixels each way" in result.output


@pytest.mark.parametrize("name", at_night(TEXT, lambda name: name != "sdxl"))
def test_every_text_family_is_recognised_at_the_size_that_is_asked_for(name: str, tmp_path: Path) -> None:
    write, pipeline, call = TEXT[name]
    size = call.get("height", RESOLUTION)
    result = CliRunner().invoke(app, ["inspect", str(write(tmp_path / "teacher")), "--resolution", str(size)])
    assert result.exit_code == 0, result.output
    assert f"diffusers.{pipeline}\n" in result.output
    assert "8, 8)" in result.output


def test_students_and_runs_are_inspected_as_they_are(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {"teacher": str(tiny_teacher), "batch_size": 4, "iterations": 1, "null_class": 9, "data": None}
    distill("digits", output=tmp_path / "run", method="diff-instruct", **settings)
    for folder in (tmp_path / "run", tmp_path / "run" / "student"):
        facts, *_ = inspect(folder)
        assert facts["condition"] == "9 classes, `no class` is 9"
    with pytest.raises(ArgumentError, match="is a student, which has its own; leave it out"):
        inspect(tmp_path / "run", resolution=16)


def test_data_of_other_classes_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((12, 8, 8), np.uint8), labels=np.arange(12))
    np.savez(tmp_path / "b.npz", images=np.zeros((12, 8, 8), np.uint8))
    with pytest.raises(DataError, match="has 12 classes, but the checkpoint has 10"):
        inspect(tiny_teacher, data=str(tmp_path / "a.npz"))
    with pytest.raises(DataError, match="has no classes, but the checkpoint has 10"):
        inspect(tiny_teacher, data=str(tmp_path / "b.npz"))


@pytest.mark.thorough
def test_a_text_to_image_teacher_is_told_captions() -> None:
    facts, checks, verdict = inspect("digits-t2i", data="digit-captions", num_images=32)
    assert facts["condition"].startswith("prompts, as prompt_embeds")
    assert facts["student"].endswith("exported as diffusers.StableDiffusionPipeline")
    assert all(check.makes_sense for check in checks)
    assert verdict is not None
    assert verdict.likely is None
    # Told which digit to draw, it is far better than the best linear denoiser even where all is noise.
    assert checks[0].error < 0.85 * checks[0].linear_error
    assert "[-1, 1] is better" in facts["autoencoder"]
    effect = re.fullmatch(
        r"at level 298\.7 the condition moves x0 by (\S+); its error is (\S+) with it, (\S+) without",
        facts["guidance"],
    )
    assert effect is not None
    moved, told, untold = map(float, effect.groups())
    assert moved > 0.02
    assert told < untold
    assert len(describe(facts, checks, verdict).splitlines()) < 30


def test_features_fit_on_a_line_or_two() -> None:
    shapes = {f"block{i}": (3072, 32, 32) for i in range(57)} | {f"depth{i}": (3072, 32, 32) for i in (25, 50, 75)}
    found = describe_features({"stem": (8, 64, 64), **shapes, "down0": (320, 64, 64), "down1": (640, 32, 32)})
    assert found == (
        "stem (8, 64, 64), block0 to block56 (3072, 32, 32), depth25, depth50, depth75 (3072, 32, 32), "
        "down0 (320, 64, 64), down1 (640, 32, 32)"
    )


def test_weights_that_are_not_finite_are_one_line(tiny_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="of its network is not finite, so its weights are damaged"):
        inspect(tmp_path / "teacher")

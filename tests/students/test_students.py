"""Students that are no copies of their teacher: from another checkpoint, or smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fdistill import distill, load_student, load_teacher
from fdistill.adapters.resize import resized
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError
from fdistill.commands.dry_run import describe
from fdistill.config.reading import load_config
from fdistill.generator import OneStepGenerator, Student
from fdistill.student_kinds import STUDENT_KINDS, KindName
from fdistill.students.kinds import KINDS
from fdistill.students.tiue import TiUEGenerator
from fdistill.training.build import build
from support.denoisers import GaussianDenoiser
from support.families import FAMILIES

SETTINGS: dict[str, Any] = {
    "data": None,
    "method": "diff-instruct",
    "batch_size": 4,
    "iterations": 1,
    "student_level": None,
    "log.tracker": "none",
    "log.samples_every": 0,
}
#: What makes each network smaller, and a part of the names it then lacks.
SMALLER: dict[str, tuple[dict[str, Any], str]] = {
    "class-conditional": ({"block_out_channels": [8, 12]}, ""),
    "edm-ddpmpp": ({"num_blocks": 0}, "enc.8x8_block0"),
    "edm-adm": ({"attn_resolutions": []}, "enc.4x4_block0.qkv"),
    "edm2": ({"attn_resolutions": []}, "enc.4x4_block0.attn"),
    "dit": ({"num_layers": 1}, "transformer_blocks.2"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: FAMILIES[name][0](folder / name) for name in SMALLER}


@pytest.mark.parametrize("name", SMALLER)
def test_what_fits_is_copied_and_listed(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    changes, missing = SMALLER[name]
    teacher: Any = load_teacher(checkpoints[name])
    smaller = resized(teacher, changes)
    weights, own = teacher.network.state_dict(), smaller.denoiser.network.state_dict()  # type: ignore[union-attr]
    assert sorted([*smaller.copied, *smaller.new]) == sorted(own)
    assert smaller.copied
    for key in smaller.copied:
        assert torch.equal(own[key], weights[key])
    for key in smaller.new:
        assert key not in weights or weights[key].shape != own[key].shape
    assert sum(value.numel() for value in own.values()) < sum(value.numel() for value in weights.values())
    if missing:
        assert any(missing in key for key in weights)
        assert not any(missing in key for key in own)

    settings = SETTINGS | {"teacher": str(checkpoints[name]), "student.network": changes}
    student = distill("digits", output=tmp_path / "run", **settings)
    listed = json.loads((tmp_path / "run" / "student_weights.json").read_text())
    assert listed == {"copied": smaller.copied, "new": smaller.new}
    generator = load_student(student)
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert count == sum(parameter.numel() for parameter in smaller.denoiser.parameters())


def test_a_dry_run_lists_them(checkpoints: dict[str, Path]) -> None:
    settings = SETTINGS | {"teacher": str(checkpoints["class-conditional"])}
    text = describe(load_config("digits", settings | {"student.network": {"block_out_channels": [8, 12]}}))
    assert "tensors copied (new: " in text
    assert "mid_block" in text


def test_a_student_may_start_from_another_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    settings = SETTINGS | {"teacher": str(checkpoints["edm-ddpmpp"])}
    first = distill("digits", output=tmp_path / "first", **settings, **{"generator.lr": 1e-2})
    run = build(load_config("digits", settings | {"student.checkpoint": str(first)}), torch.device("cpu"))
    exported = load_student(first).state_dict()
    for key, value in run.student.state_dict().items():
        assert torch.equal(value, exported[key])
    teacher = load_teacher(checkpoints["edm-ddpmpp"]).state_dict()
    assert any(not torch.equal(value, teacher[key]) for key, value in run.student.denoiser.state_dict().items())
    for key, value in run.networks.fake_score.state_dict().items():
        assert torch.equal(value, teacher[key])
    assert f"from {first}" in describe(load_config("digits", settings | {"student.checkpoint": str(first)}))


def test_even_one_of_another_family(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    settings = SETTINGS | {"student.checkpoint": str(checkpoints["class-conditional"]), "student_level": 700}
    student = distill("digits", output=tmp_path / "run", teacher=str(checkpoints["edm-ddpmpp"]), **settings)
    generator = load_student(student)
    assert type(generator.denoiser).__name__ == "UNet2DDenoiser"
    assert generator(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student.network": {"num_layer": 1}}, ConfigError, "student.network.num_layer: .* did you mean 'num_layers'"),
        ({"student.network": {"sample_size": 16}}, ConfigError, r"makes samples \(4, 16, 16\)"),
        ({"student.network": {"num_attention_heads": "two"}}, ConfigError, "cannot be built"),
        ({"student.network": {"num_layers": 0}}, ConfigError, "cannot be built"),
        ({"student.network": {"patch_size": 3}}, ConfigError, "cannot be built|makes samples"),
        ({"student.checkpoint": "edm-ddpmpp"}, ConfigError, r"makes samples \(3, 8, 8\)"),
        ({"student.checkpoint": "nowhere"}, CheckpointError, "no such folder"),
        ({"student_level": 1001}, ConfigError, r"level: expected a number in \(0, 999\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str, checkpoints: dict[str, Path]
) -> None:
    name = changes.get("student.checkpoint")
    if name in checkpoints:
        changes = {"student.checkpoint": str(checkpoints[name])}
    settings = SETTINGS | {"teacher": str(checkpoints["dit"])}
    with pytest.raises(error, match=message):
        build(load_config("digits", settings | changes), torch.device("cpu"))


@pytest.mark.parametrize("name", ["edm-ddpmpp", "edm2", "class-conditional"])
def test_the_last_label_may_stand_for_no_class(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    changes, _ = SMALLER[name]
    settings = SETTINGS | {"teacher": str(checkpoints[name]), "null_class": 9, "guidance_scale": 1.5}
    student = distill("digits", output=tmp_path / "run", **settings, **{"student.network": changes})
    generator = load_student(student)
    assert (generator.num_classes, generator.denoiser.null_class) == (9, 9)
    assert generator(torch.randn(2, 3, 8, 8), torch.tensor([0, 8])).shape == (2, 3, 8, 8)


def test_what_the_weights_mean_is_not_architecture(checkpoints: dict[str, Path]) -> None:
    for change in ({"sigma_data": 1.0}, {"sigma_max": 10.0}, {"label_dropout": 0.1}):
        with pytest.raises(ConfigError, match="has no such setting"):
            resized(load_teacher(checkpoints["edm-ddpmpp"]), change)


def test_pairs_need_a_student_of_the_teachers_schedule(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    settings = SETTINGS | {"method": "dmd", "student.checkpoint": str(checkpoints["class-conditional"])}
    settings |= {"student_level": 50, "regression.pairs": 8, "teacher_samples.num_steps": 2}
    with pytest.raises(ConfigError, match="which means another noise to the teacher"):
        distill("digits", output=tmp_path / "run", teacher=str(checkpoints["edm-ddpmpp"]), **settings)


# --- kinds


def test_every_kind_of_student_has_its_facts_and_its_functions() -> None:
    assert list(STUDENT_KINDS) == list(KINDS) == list(get_args(KindName))
    classes: dict[KindName, type[Student]] = {"denoiser": OneStepGenerator, "tiue": TiUEGenerator}
    for name, kind in STUDENT_KINDS.items():
        predicts = classes[name].sample_with_predictions is not Student.sample_with_predictions
        assert predicts == kind.predicts_noise, name


def test_what_a_denoiser_may_leave_out_is_refused_in_a_sentence() -> None:
    denoiser = GaussianDenoiser(0.0, 0.5, size=4)
    assert denoiser.network is None
    denoiser.resize(1, 4)
    with pytest.raises(ArgumentError, match="a GaussianDenoiser has one size; expected 1 x 4"):
        denoiser.resize(8, 8)
    with pytest.raises(ArgumentError, match="a GaussianDenoiser takes no other network"):
        denoiser.with_network(torch.nn.Identity())
    student = OneStepGenerator(denoiser, 2.5)
    with pytest.raises(ArgumentError, match="OneStepGenerator predicts no noise while sampling"):
        student.sample_with_predictions(torch.zeros(1, 1, 1, 4))

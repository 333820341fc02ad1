"""Runs in stages: each stage is a run with its settings that goes on from the one before, bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdistill import distill
from fdistill.base.errors import ConfigError
from fdistill.commands.dry_run import describe
from fdistill.config.reading import dump_config, load_config
from fdistill.methods import METHODS
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints
from fdistill.training.journal import read_records

QUICK: dict[str, Any] = {
    "batch_size": 8,
    "log.every": 2,
    "log.samples_every": 0,
    "log.checkpoint_every": 1,
    "log.keep_checkpoints": 9,
    "log.tracker": "none",
    "ratio.momentum": 0.5,
    "generator.lr_warmup": 0,
    "fake_score.lr_warmup": 0,
}


def state(folder: Path, iteration: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"{iteration:06d}" / "state.safetensors")


def run(teacher: Path, folder: Path, **settings: Any) -> Path:
    resume = bool(settings.pop("resume", False))
    distill("digits", output=folder, resume=resume, **{"teacher": str(teacher), **QUICK, **settings})
    return folder


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name, value in one.items() if not torch.equal(value, two[name])]


CHANGES: dict[str, Any] = {
    "generator": {"lr": 1e-5, "gan_weight": 0.7, "grad_clip": 0.5, "beta1": 0.3},
    "fake_score": {"lr": 3e-5, "weighting": "inverse-sigma2"},
    "discriminator": {"gan_weight": 0.4, "r1_weight": 2.0},
    "matching_levels": {"low": 0.1},
    "ratio": {"upper": 5.0, "momentum": 0.8},
    "divergence": "forward-kl",
}


def test_a_stage_is_the_run_before_it_resumed_with_other_settings(tiny_teacher: Path, tmp_path: Path) -> None:
    """The settings are changed by hand in the folder of a plain run, which then goes on."""
    staged = run(tiny_teacher, tmp_path / "staged", stages=[{"iterations": 3}, {"iterations": 2, **CHANGES}])
    plain = run(tiny_teacher, tmp_path / "plain", iterations=3)
    assert_same(state(plain, 3), state(staged, 3))
    settings = {"teacher": str(tiny_teacher), **QUICK, "iterations": 5, **CHANGES}
    config, described = load_config("digits", settings), plain / "checkpoints" / "000003" / "state.json"
    (plain / "config.yaml").write_text(dump_config(config))
    described.write_text(json.dumps(json.loads(described.read_text()) | {"config": config.model_dump(mode="json")}))
    run(tiny_teacher, plain, resume=True, iterations=5, **CHANGES)
    assert_same(state(plain, 5), state(staged, 5))
    unchanged = run(tiny_teacher, tmp_path / "unchanged", iterations=5)
    other = state(unchanged, 5)
    assert not torch.equal(other["ratio.bins"], state(staged, 5)["ratio.bins"])


STAGES = [
    {"iterations": 2, "method": "diff-instruct", "fake_score.lr_warmup": 2},
    {"iterations": 3, "critic_steps": 1, "generator": {"lr_schedule": "cosine", "lr": 1e-3}, "ratio.warmup": 2},
    {"iterations": 2, "method": "sid", "generator.lr": 3e-5},
]


@pytest.mark.thorough
def test_a_run_resumed_within_a_stage_equals_an_uninterrupted_one(tiny_teacher: Path, tmp_path: Path) -> None:
    """Methods, batches read for an update of the student, schedules and the ratio's warm-up all change on the way."""
    straight = run(tiny_teacher, tmp_path / "straight", stages=STAGES)
    for at in (1, 2, 3, 4, 6):
        folder = tmp_path / str(at)
        shutil.copytree(straight, folder)
        for made in checkpoints(folder / "checkpoints"):
            if int(made.name) > at:
                shutil.rmtree(made)
        run(tiny_teacher, folder, stages=STAGES, resume=True)
        assert_same(state(straight, 7), state(folder, 7))
        for one, two in zip(*(read_records(f / "metrics.jsonl") for f in (straight, folder)), strict=True):
            assert {key: value for key, value in one.items() if "second" not in key} == {
                key: value for key, value in two.items() if "second" not in key
            } or one["iteration"] == at + at % 2  # its means are those since the checkpoint


def test_what_a_stage_does_not_train_stays(tiny_teacher: Path, tmp_path: Path) -> None:
    """Without a GAN the heads stay as they were built, weight decay included; with it they learn."""
    decay = {"discriminator.weight_decay": 0.5}
    folder = run(tiny_teacher, tmp_path / "run", stages=STAGES, **decay)
    settings = {"teacher": str(tiny_teacher), **QUICK, "stages": STAGES, **decay}
    start = build(load_config("digits", settings), torch.device("cpu")).state()
    heads = [name for name in start if name.startswith("discriminator.")]
    found = [state(folder, at) for at in (2, 5, 7)]
    for name in heads:
        assert torch.equal(found[0][name], start[name]), name
        assert not torch.equal(found[1][name], start[name]), name
        assert torch.equal(found[2][name], found[1][name]), name


def test_averages_go_on_with_another_decay(tiny_teacher: Path, tmp_path: Path) -> None:
    stages = [{"iterations": 2}, {"iterations": 1, "ema.decays": [0.0, 1 / 3]}]
    folder = run(tiny_teacher, tmp_path / "run", stages=stages, **{"ema.decays": [0.9, 0.99], "ema.export": 0.99})
    before, after = state(folder, 2), state(folder, 3)
    names = [name.removeprefix("ema.0.9.") for name in after if name.startswith("ema.0.9.")]
    for name in names:
        weight = after[f"generator.{name}"].float()
        assert torch.equal(after[f"ema.0.9.{name}"], weight)
        torch.testing.assert_close(after[f"ema.0.99.{name}"], weight * 2 / 3 + before[f"ema.0.99.{name}"] / 3)
    assert any(not torch.equal(before[f"ema.0.9.{name}"], before[f"generator.{name}"]) for name in names)


def test_changes_are_recorded(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = run(tiny_teacher, tmp_path / "run", stages=STAGES, **{"log.checkpoint_every": 0})
    records = read_records(folder / "metrics.jsonl")
    assert [(record["iteration"], record["stage"]) for record in records] == [(2, 1), (4, 2), (5, 2), (6, 3), (7, 3)]
    rates = [record["generator/lr"] for record in records]
    assert rates == pytest.approx([4e-4, 1e-3 * 0.75, 1e-3 * 0.25, 3e-5, 3e-5])
    assert records[0]["fake_score/lr"] == records[2]["fake_score/lr"]  # the end of the warm-up, and what follows
    assert [("discriminator/grad_norm" in record) for record in records] == [False, True, True, False, False]
    card = (folder / "student" / "README.md").read_text()
    assert "2 iterations: method=diff-instruct, fake_score.lr_warmup=2; 3 iterations: critic_steps=1," in card
    assert load_config(str(folder / "config.yaml")) == load_config(
        "digits", {"teacher": str(tiny_teacher), **QUICK, "stages": STAGES, "log.checkpoint_every": 0}
    )


def test_a_dry_run_lists_them(tiny_teacher: Path) -> None:
    text = describe(load_config("digits", {"teacher": str(tiny_teacher), "stages": STAGES, "generator.lr_warmup": 0}))
    assert "stage 1        2 iterations: method=diff-instruct, fake_score.lr_warmup=2\n" in text
    assert "stage 3        2 iterations: method=sid, generator.lr=3e-05\n" in text
    assert "iterations     7, each" in text


def stage_of(stage: dict[str, Any], **base: Any) -> Any:
    config = load_config("digits", {"stages": [{"iterations": 2, **stage}], **base})
    return config.stage_configs()[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["f-distill", "dmd", "sid"])
def test_a_stage_of_another_method_has_that_methods_settings(base: str, method: str) -> None:
    """As a config of that method has them; where networks would have to change, it is refused."""
    shaped = {"vsd": "lora_rank=64", "sida": "head='channel-mean'"}
    if method in shaped:
        with pytest.raises(ConfigError, match=rf"{shaped[method]} and the run has .*cannot change during a run"):
            stage_of({"method": method}, method=base)
        return
    guided = {"guidance_scale": 2.0} if method == "decoupled-dmd" else {}
    found = stage_of({"method": method}, method=base, **guided)
    alone = load_config("digits", {"method": method, "iterations": 2, **guided})
    for key in ("method", "divergence", "objective", "regression", "clip_loss", "reward", "augmentation"):
        assert getattr(found, key) == getattr(alone, key), key
    assert (found.generator.gan_weight, found.discriminator.gan_weight, found.generator.weighting) == (
        alone.generator.gan_weight,
        alone.discriminator.gan_weight,
        alone.generator.weighting,
    )


def test_a_stage_of_another_method_leaves_out_what_the_method_before_had_of_its_own() -> None:
    base = {"method": "decoupled-dmd", "guidance_scale": 2.0}
    assert stage_of({}, **base).augmentation.weight == 1
    assert stage_of({"method": "dmd2"}, **base).augmentation.weight == 0
    own = {"method": "f-distill", "guidance_scale": 2.0, "augmentation.weight": 0.5}
    assert stage_of({"method": "dmd2"}, **own).augmentation.weight == 0.5  # the run's
    warmed = stage_of({"method": "regression"}, method="dmd2", reuse_samples=True)
    assert not warmed.reuse_samples
    for term, kind in (("reward", "pt"), ("clip_loss", "safetensors")):
        found = stage_of({"method": "sid"}, **{f"{term}.weights": f"a.{kind}", f"{term}.gradient_ratio": 0.1})
        assert not getattr(found, term).used


def test_a_stage_changes_what_it_names_alone() -> None:
    base = load_config("digits", {"generator.lr": 5e-4, "ratio.warmup": 7, "stages": [{"iterations": 2}]})
    plain = base.model_copy(update={"stages": []})
    assert base.iterations == 2
    assert base.stage_configs() == (plain,)
    changed = stage_of({"generator": {"gan_weight": 0.5}, "generator.lr": 1e-6}, **{"generator.beta1": 0.4})
    assert (changed.generator.gan_weight, changed.generator.lr, changed.generator.beta1) == (0.5, 1e-6, 0.4)
    assert stage_of({"method": "dmd2", "critic_steps": 3}, critic_steps=9).critic_steps == 3
    assert stage_of({"method": "dmd2"}, critic_steps=9).critic_steps == 5  # the row's
    assert stage_of({"critic_steps": 3}, critic_steps=9).critic_steps == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 3}, r"stages: got 3; expected a list such as"),
        ({"stages": [3]}, "stage 1: got 3; expected iterations and the settings"),
        ({"stages": [{"iterations": 2}, {}]}, "stage 2: iterations: got None; expected how many it has, at least 1"),
        ({"stages": [{"iterations": 2}], "iterations": 3}, "iterations: got 3, but the stages have 2 in all"),
        ({"stages": [{"iterations": 2, "generator.lr": -1}]}, r"stage 1: generator\.lr: got -1; expected more than 0"),
        ({"stages": [{"iterations": 2, "generator.lrr": 1}]}, r"stage 1: generator\.lrr: no such setting; did you me"),
        ({"stages": [{"iterations": 2, "batchsize": 1}]}, "stage 1: batchsize: no such setting; did you mean 'batch_s"),
        ({"stages": [{"iterations": 2, "stages": []}]}, "stage 1: stages: cannot change during a run"),
        ({"stages": [{"iterations": 2, "method": "sidd"}]}, "stage 1: method: got 'sidd'; did you mean 'sid'"),
        ({"stages": [{"iterations": 2, "discriminator.gan_weight": 0.0}]}, "stage 1: generator.gan_weight: got 0.001"),
        (
            {"stages": [{"iterations": 2, "generator.lr_schedule": "linear", "generator.lr_warmup": 2}]},
            "stage 1: generator.lr_warmup: got 2 of 2 iterations",
        ),
        (
            {"stages": [{"iterations": 2, "ema.decays": [0.5, 0.6]}], "ema": {"decays": [0.95], "export": 0.95}},
            r"stage 1: ema.decays: got \[0.5, 0.6\]; expected a decay for each of the run's averages \[0.95\]",
        ),
        (
            {"stages": [{"iterations": 2, "ema.decays": [0.5]}]},
            r"stage 1: ema.decays: got \[0.5\]; expected none: the run's averages have widths \(ema.sigma_rel\), which",
        ),
        (
            {"stages": [{"iterations": 2, "method": "diffratio"}, {"iterations": 1}]},
            "stages: methods diffratio and f-distill train different parts of the fake score's network",
        ),
        *(
            ({"stages": [{"iterations": 2, key: value}]}, rf"stage 1: {key}: cannot change during a run")
            for key, value in {
                "batch_size": 4,
                "data": None,
                "teacher": "digits",
                "guidance_scale": 2.0,
                "student.network.layers_per_block": 1,
                "student_level": 1.0,
                "fake_score.lora_rank": 2,
                "discriminator.features": ["down0"],
                "ratio.num_bins": 3,
                "ema.sigma_rel": [0.1],
                "regression.pairs": 3,
                "log.every": 1,
                "precision": "bf16",
                "condition_dropout": 0.1,
            }.items()
        ),
    ],
)
def test_what_a_stage_cannot_be_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits", settings)


def test_stages_cannot_change_when_a_run_is_resumed(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = run(tiny_teacher, tmp_path / "run", stages=[{"iterations": 1}])
    with pytest.raises(ConfigError, match=r"stage 1\.generator\.gan_weight: None -> 0\.5"):
        run(tiny_teacher, folder, stages=[{"iterations": 1, "generator.gan_weight": 0.5}], resume=True)
    with pytest.raises(ConfigError, match=r"stage 2\.iterations: None -> 1"):
        run(tiny_teacher, folder, stages=[{"iterations": 1}, {"iterations": 1}], resume=True)

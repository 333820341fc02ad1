"""Warm-up by regression on the teacher's own pairs: by itself, as a stage of every method, and of every teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor

from fdistill import distill
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.methods import METHODS
from fdistill.sampler import heun_sample, heun_states
from fdistill.step import Pairs, regression_step
from fdistill.training.batches import Batches
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints
from fdistill.training.distillation import Distillation
from fdistill.training.inputs import TrainingData, pair_samples, training_data
from fdistill.training.journal import read_records
from support.text_families import sd15
from support.text_runs import PROMPTS, SETTINGS
from support.thorough import at_night

QUICK: dict[str, Any] = {
    "batch_size": 8,
    "log.every": 1,
    "log.samples_every": 0,
    "log.checkpoint_every": 1,
    "log.keep_checkpoints": 9,
    "log.tracker": "none",
    "regression.pairs": 16,
    "teacher_samples.num_steps": 3,
}


def built(teacher: Path, **settings: Any) -> Distillation:
    return build(load_config("digits", {"teacher": str(teacher), **QUICK, **settings}), torch.device("cpu"))


def state(folder: Path, iteration: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"{iteration:06d}" / "state.safetensors")


def test_the_update_is_its_formula(tiny_teacher: Path) -> None:
    made = built(tiny_teacher, method="regression", iterations=1, **{"regression.weight": 0.6})
    noise, x0, labels = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.arange(8)
    found = regression_step(
        made.networks,
        None,
        torch.Generator(),
        batch_size=8,
        pairs=Pairs(noise, x0, labels),
        regression_weight=0.6,
    )
    expected = 0.6 * (made.student(noise, labels) - x0).square().mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    trained = list(made.student.parameters())
    for got, wanted in zip(
        torch.autograd.grad(found.loss, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    again = made.student_update(None, torch.Generator(), batch_size=8, pairs=Pairs(noise, x0, labels))
    assert again.loss.item() == found.loss.item()


def test_the_student_learns_its_pairs_alone(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "method": "regression", "iterations": 60, "generator.lr": 1e-2, "log.checkpoint_every": 0}
    distill("digits", output=tmp_path / "run", teacher=str(tiny_teacher), **settings)
    losses = [record["generator/regression"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    saved = {name.split(".")[0] for name in state(tmp_path / "run", 60)}
    assert saved == {"generator", "optimizer", "ema", "ratio"}


@pytest.mark.parametrize(
    "method",
    at_night([name for name in METHODS if name != "regression"], lambda name: name not in ("f-distill", "sid")),
)
def test_every_method_can_be_warmed_up(tiny_teacher: Path, tmp_path: Path, method: str) -> None:
    """Critic and heads wait untrained, and read no data: the stage that follows sees the first batch."""
    warm = {"iterations": 2, "method": "regression", "generator.lr": 1e-3}
    guided: dict[str, Any] = {}
    if method == "decoupled-dmd":
        guided = {"guidance_scale": 2.0, "guidance_teacher": "digits"}
    settings: dict[str, Any] = {"teacher": str(tiny_teacher), "method": method, **QUICK, **guided}
    distill("digits", output=tmp_path / "run", stages=[warm, {"iterations": 1}], **settings)
    start = built(tiny_teacher, method=method, stages=[warm, {"iterations": 1}], **guided)
    before, warmed, after = start.state(), state(tmp_path / "run", 2), state(tmp_path / "run", 3)
    changed = {
        at: {
            name.split(".")[0]
            for name, value in found.items()
            if name.split(".")[0] in ("generator", "fake_score", "discriminator")
            and not torch.equal(value, before[name])
        }
        for at, found in (("warmed", warmed), ("after", after))
    }
    assert changed["warmed"] == {"generator"}
    assert changed["after"] == {role for role in start.optimizers if any(key.startswith(f"{role}.") for key in before)}
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [("generator/regression" in record) for record in records] == [True, True, method == "dmd"]


@pytest.mark.thorough
def test_a_resumed_warm_up_equals_an_uninterrupted_one(tiny_teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": str(tiny_teacher), **QUICK}
    stages = [{"iterations": 2, "method": "regression"}, {"iterations": 2}]
    distill("digits", output=tmp_path / "straight", stages=stages, **settings)
    for at in (1, 3):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "straight", folder)
        for made in checkpoints(folder / "checkpoints"):
            if int(made.name) > at:
                shutil.rmtree(made)
        distill("digits", output=folder, resume=True, stages=stages, **settings)
        one, two = state(tmp_path / "straight", 4), state(folder, 4)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_edms_pairs_start_at_the_students_level(tiny_teacher: Path) -> None:
    for level, start in ((2.5, 2.5), (None, 80.0)):
        wanted = pair_samples(built(tiny_teacher, method="regression", student_level=level))
        assert wanted is not None
        assert wanted.start_level == start


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Distillation, TrainingData]:
    """A student that starts at timestep 399 of Stable Diffusion, guided, with prompts."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    teacher = sd15(folder / "sd15")
    settings = {**SETTINGS, "student_level": 399, "prompts": str(folder / "prompts.txt"), "regression.pairs": 8}
    settings |= {"teacher_samples.num_steps": 4, "data": None, "condition_dropout": 0.0}
    made = built(teacher, method="regression", **settings)
    return made, training_data(made)


def test_a_student_at_a_middle_level_learns_from_the_whole_ode(text_run: tuple[Distillation, TrainingData]) -> None:
    """As DMD2's SDXL student, which is told timestep 399 and given pure noise: at 399 the teacher expects signal."""
    made, data = text_run
    teacher, text, pairs = made.networks.teacher, made.text, data.pairs
    assert pairs is not None
    assert text is not None
    assert teacher.guidance_scale == 2.0
    made.iteration = 0
    given = Batches(made, data, iter(()))._pairs()["pairs"]
    batch = made.config.batch_size
    assert len(given.noise) == len(given.condition) == batch  # type: ignore[arg-type]
    x0 = heun_sample(teacher, given.noise, given.condition, 4, start_level=teacher.schedule.t_max)
    torch.testing.assert_close(given.x0, x0, rtol=1e-3, atol=1e-3)
    from_399 = heun_sample(teacher, given.noise, given.condition, 4, start_level=399.0)
    assert (given.x0 - from_399).abs().mean() > 10 * (given.x0 - x0).abs().mean()
    other = given.condition.rows(torch.arange(1, batch + 1) % batch)  # type: ignore[union-attr]
    assert (heun_sample(teacher, given.noise, other, 4) - x0).abs().max() > 10 * (given.x0 - x0).abs().max()


@pytest.mark.thorough
def test_pairs_are_samples_of_diffusers_own_ode(text_run: tuple[Distillation, TrainingData]) -> None:
    """With many steps, DDIM (the same ODE, by another solver) makes the same of the noise that the student is given."""
    made, data = text_run
    teacher = made.networks.teacher
    given = Batches(made, data, iter(()))._pairs()["pairs"]
    config = DDPMScheduler.from_pretrained(made.checkpoint.folder, subfolder="scheduler").config
    scheduler = DDIMScheduler.from_config(
        config, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False, prediction_type="sample"
    )
    scheduler.set_timesteps(250)
    x = given.noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x0 = teacher.denoise(x, t.float().expand(len(x)), given.condition)
            x = scheduler.step(x0, t, x).prev_sample
        fine = heun_sample(teacher, given.noise, given.condition, 60)
    assert (x - fine).abs().mean() < 0.05 * fine.abs().mean()


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_a_step_of_several_learns_the_end_of_the_ode_from_its_own_sample_there(
    tiny_teacher: Path, sampler: str
) -> None:
    levels = [2.5, 0.9, 0.2]
    made = built(tiny_teacher, method="regression", iterations=1, student_level=levels, **{"student.sampler": sampler})
    data, teacher, seen = training_data(made), made.networks.teacher, set()
    assert data.pairs is not None
    for made.iteration in range(12):
        given = Batches(made, data, iter(()))._pairs()["pairs"]
        x0, states = heun_states(teacher, given.noise, given.condition, 3, levels)
        torch.testing.assert_close(given.x0, x0, rtol=1e-3, atol=1e-4)
        place = levels.index(given.level or 0.0)
        seen.add(place)
        x_t = levels[0] * given.noise if place == 0 else states[:, place - 1]
        if place:
            torch.testing.assert_close(given.x_t, x_t, rtol=1e-3, atol=1e-4)
        expected = (made.student.denoiser(x_t, torch.full((8,), levels[place]), given.condition) - x0).square().mean()
        found = made.student_update(None, torch.Generator(), batch_size=8, pairs=given)
        torch.testing.assert_close(found.loss, expected, rtol=1e-3, atol=1e-5)
        assert found.logs["generator/regression"].t.unique().tolist() == [pytest.approx(levels[place])]
    assert seen == {0, 1, 2}


def test_a_student_of_several_steps_is_warmed_up(tiny_teacher: Path, tmp_path: Path) -> None:
    """All of its steps come nearer to the ODE, and the stage that follows goes on from there."""
    few: dict[str, Any] = {**QUICK, "student_level": [2.5, 0.9], "log.checkpoint_every": 0}
    warm = {"iterations": 80, "method": "regression", "generator.lr": 1e-2}
    distill("digits", output=tmp_path / "run", teacher=str(tiny_teacher), stages=[warm, {"iterations": 1}], **few)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    losses = [record["generator/regression"] for record in records[:80]]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert "generator/matching" in records[80]


def test_what_has_no_pairs_is_said(tiny_teacher: Path) -> None:
    warm = [{"iterations": 1, "method": "regression"}, {"iterations": 1}]
    with pytest.raises(ConfigError, match=r"stage 1: regression\.weight: teacher pairs are of the whole network"):
        load_config("digits", {"stages": warm, "student.generator": "tiue", "student_level": [2.5, 0.5]})
    with pytest.raises(ConfigError, match=r"stage 1: regression\.pairs: method=regression regresses"):
        load_config("digits", {"stages": warm, "regression.pairs": 0})

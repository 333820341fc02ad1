"""Updates in parts against the same updates of the whole batch: the same gradients, up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdistill import distill
from fdistill.base import rng
from fdistill.base.errors import ConfigError
from fdistill.commands.dry_run import describe
from fdistill.condition import TextCondition
from fdistill.config.reading import load_config
from fdistill.kernels.reference.renoise import counter_normal
from fdistill.methods import METHODS
from fdistill.noise import EDMSchedule
from fdistill.rollout import Rollout
from fdistill.step import Pairs
from fdistill.step.roles import renoise
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints
from fdistill.training.distillation import Distillation
from fdistill.training.journal import read_records
from fdistill.training.parts import ImageLoss, Split, backward, part_of
from support.denoisers import GaussianDenoiser
from support.thorough import at_night

BATCH = 12
LABELS = torch.arange(BATCH) % 10
QUICK: dict[str, Any] = {"batch_size": BATCH, "log.samples_every": 0, "log.tracker": "none", "log.every": 1}


def built(teacher: Path, **settings: Any) -> Distillation:
    """With a fake score and a student that are no longer the teacher's copies."""
    made = build(load_config("digits", {"teacher": str(teacher), **QUICK, **settings}), torch.device("cpu"))
    random = torch.Generator().manual_seed(1)
    for network in (made.networks.fake_score, made.networks.generator):
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return made


def gradients(made: Distillation, update: Any, arguments: Mapping[str, Any], count: int) -> tuple[Tensor, Tensor, Any]:
    """All gradients in a row, the state of the generator afterwards, and the logs."""
    generator = torch.Generator().manual_seed(3)
    logs = backward(update, arguments, generator, Split(count, "fp32"))
    parameters = [p for role in made.optimizers for p in made.role(role).parameters() if p.requires_grad]
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found, generator.get_state(), logs


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS if name not in ("f-distill", "uni-instruct", "vsd")},
    "f-distill": {"divergence": "reverse-kl", "generator.gan_weight": 1e-3},  # a fixed one: see stages.md
    "uni-instruct": {"method": "uni-instruct", "divergence": "reverse-kl"},
    "decoupled-dmd": {"method": "decoupled-dmd", "null_class": 9, "guidance_scale": 2.0},
    "two steps": {"method": "dmd2", "student_level": [2.5, 0.5]},
    "exact r1": {"method": "dmd2", "discriminator.r1_weight": 3.0},
    "approximate r1": {"method": "dmd2", "discriminator": {"r1_weight": 300.0, "r1": "approximate"}},
    "teacher's features": {"method": "dmd2", "discriminator.source": "teacher"},
}


@pytest.mark.parametrize("name", at_night(VARIANTS, lambda name: name not in ("two steps", "sid")))
def test_parts_have_the_gradients_of_the_whole_batch(tiny_teacher: Path, name: str) -> None:
    made = built(tiny_teacher, **VARIANTS[name])
    noise, x0, real = torch.randn(3, BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    student: dict[str, Any] = {"condition": LABELS, "batch_size": BATCH}
    if METHODS[made.config.method].pairs:
        student["pairs"] = Pairs(noise, x0, LABELS)
    if len(made.student.levels) > 1:
        student["rollout"] = Rollout(made.student.levels)
    updates = [(made.student_update, student)]
    if made.stage.critic_update is not None:
        critic: dict[str, Any] = {"real_x0": real, "condition": LABELS}
        if METHODS[made.config.method].scores:
            critic["critic_condition"] = LABELS.flip(0)
        updates.append((made.critic_update, critic))
    for update, arguments in updates:
        whole, after, (logs,) = gradients(made, update, arguments, 1)
        assert whole.norm() > 1e-6
        for count in (2, 3, 12):
            parts, state, pieces = gradients(made, update, arguments, count)
            assert (parts - whole).norm() < 1e-4 * whole.norm(), (name, count)
            assert torch.equal(state, after) or METHODS[made.config.method].critic is None
            assert len(pieces) == count
            for key, entry in logs.items():
                joined = torch.cat([piece[key].value for piece in pieces])
                torch.testing.assert_close(joined, entry.value, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(torch.cat([piece[key].t for piece in pieces]), entry.t, rtol=1e-5, atol=1e-6)


def test_a_ratio_is_the_parts_own(tiny_teacher: Path) -> None:
    """What docs/stages.md says differs: with bins and a mean of its own, a part has other weights."""
    made = built(tiny_teacher, divergence="forward-kl", **{"ratio.momentum": 0.0, "generator.gan_weight": 0.0})
    arguments = {"condition": LABELS, "batch_size": BATCH}
    _, _, (logs,) = gradients(made, made.student_update, arguments, 1)
    _, _, pieces = gradients(made, made.student_update, arguments, 3)
    assert logs["generator/weight"].value.mean() == pytest.approx(1, abs=1e-5)
    for piece in pieces:
        assert piece["generator/weight"].value.mean() == pytest.approx(1, abs=1e-5)
    joined = torch.cat([piece["generator/weight"].value for piece in pieces])
    assert (joined - logs["generator/weight"].value).abs().max() > 1e-3


def test_draws_of_parts_are_rows_of_the_whole_draw() -> None:
    def drawn(batch: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        x0, t = rng.normal(random, batch, (1, 1, 2)), rng.uniform(random, batch) + 0.1
        x_t, _, _ = renoise([GaussianDenoiser(0.0, 1.0, size=2)], x0, t, random)
        return [x0, t, x_t]

    whole = drawn(6)
    for count in (2, 3):
        pieces = []
        for number in range(count):
            with rng.part(number, count):
                pieces.append(drawn(6 // count))
        for value, parts in zip(whole, zip(*pieces, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(parts), value, rtol=1e-6, atol=1e-6)
    assert rng.share() == (0, 1)
    # The noise of the whole: the counter's, for samples 0 to 5.
    random = torch.Generator().manual_seed(0)
    x0, t = rng.normal(random, 6, (1, 1, 2)), rng.uniform(random, 6) + 0.1
    eps = counter_normal(rng.device_seed(random), 0, 6, 2).reshape(x0.shape)
    torch.testing.assert_close(whole[2], x0 + EDMSchedule().sigma(t).reshape(-1, 1, 1, 1) * eps)


def test_everything_with_a_row_for_each_sample_is_divided() -> None:
    text = TextCondition({"prompt_embeds": torch.arange(6.0).reshape(6, 1, 1)})
    image_loss = ImageLoss(lambda x0, features: x0[:, 0] + features[:, 0], torch.arange(6.0)[:, None])
    values = {
        "condition": text,
        "real_x0": torch.arange(6.0),
        "pairs": Pairs(torch.arange(6.0), torch.arange(6.0) + 10, text),
        "image_loss": image_loss,
        "ratio_ramp": 0.3,
        "rollout": Rollout((2.5, 0.5), torch.arange(6)),
        "batch_size": 6,
    }
    found = part_of(values, 1, 3)
    assert found["condition"]["prompt_embeds"].flatten().tolist() == [2, 3]
    assert found["real_x0"].tolist() == [2, 3]
    assert found["pairs"].x0.tolist() == [12, 13]
    assert found["pairs"].condition["prompt_embeds"].flatten().tolist() == [2, 3]
    assert found["image_loss"](torch.zeros(2, 1)).tolist() == [2, 3]
    assert (found["ratio_ramp"], found["batch_size"]) == (0.3, 2)
    assert (found["rollout"].levels, found["rollout"].x0.tolist()) == ((2.5, 0.5), [2, 3])
    assert part_of({"pairs": Pairs(torch.arange(2.0), torch.arange(2.0), None)}, 0, 2)["pairs"].condition is None


def test_a_run_in_parts_is_the_run(tiny_teacher: Path, tmp_path: Path) -> None:
    """With an eps that keeps Adam from blowing up rounding where a gradient is zero."""
    eps = {f"{role}.eps": 1e-3 for role in ("generator", "fake_score", "discriminator")}
    make = partial(distill, "digits", teacher=str(tiny_teacher), method="dmd2", iterations=3, **QUICK, **eps)
    make(output=tmp_path / "whole")
    make(output=tmp_path / "parts", **{"generator.micro_batch": 4, "fake_score.micro_batch": 3})
    one, two = (
        load_file(checkpoints(tmp_path / name / "checkpoints")[-1] / "state.safetensors") for name in ("whole", "parts")
    )
    for name, value in one.items():
        if name.startswith(("generator.", "fake_score.", "discriminator.")):
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    records = [read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    for first, second in zip(*records, strict=True):
        assert first.keys() == second.keys()
        for key in ("generator/grad_norm", "fake_score/grad_norm", "fake_score/denoising", "generator/matching"):
            assert second[key] == pytest.approx(first[key], rel=1e-3), key


def test_what_does_not_divide_is_said(tiny_teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": str(tiny_teacher), **QUICK}
    with pytest.raises(ConfigError, match=r"fake_score\.micro_batch: got 5, which does not divide the 12 samples"):
        distill("digits", output=tmp_path / "run", **settings, **{"fake_score.micro_batch": 5})
    stages = [{"iterations": 1, "generator.micro_batch": 8}]
    with pytest.raises(ConfigError, match=r"generator\.micro_batch: got 8, which does not divide the 12 samples"):
        distill("digits", output=tmp_path / "run", **settings, stages=stages)
    assert not (tmp_path / "run").exists()
    text = describe(load_config("digits", {**settings, "generator.micro_batch": 4, "fake_score.micro_batch": 12}))
    assert "accumulated    generator: 3 parts of 4 samples" in text
    assert "fake_score: " not in text.split("accumulated")[1]

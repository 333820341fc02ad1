"""The preference score as a loss, on tiny random models of the real classes: the metric's score, and its gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evaluation.extractors import open_text_image_model
from fdistill import distill
from fdistill.base.errors import CheckpointError
from fdistill.base.images import to_unit
from fdistill.config.terms import RewardConfig
from fdistill.denoiser import LatentScaling
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.training.reward import RewardLoss, load_preference_model
from support.families import tiny_vae
from support.preference import pictures, tiny_hps, tiny_pickscore
from support.text_families import sd15
from support.text_runs import PROMPTS, SETTINGS

TWO = ["a bold seven", "a horse on a " + "very " * 80 + "long meadow"]


@pytest.fixture(params=["hps21", "pickscore"])
def reward(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RewardConfig:
    """The settings of a tiny model."""
    make = {"hps21": tiny_hps, "pickscore": tiny_pickscore}[request.param]
    return RewardConfig(model=request.param, weights=str(make(tmp_path, monkeypatch)[0]))


def metric(reward: RewardConfig, images: torch.Tensor) -> torch.Tensor:
    model = open_text_image_model(reward.model, torch.device("cpu"), {reward.model: Path(str(reward.weights))})
    return (model.extractor.run(images)["image"] * model.encode_prompts(TWO)).sum(1)


def test_the_loss_is_minus_the_metrics_score(reward: RewardConfig) -> None:
    """PickScore's metric rounds an image that it resizes to 8 bits."""
    loss = RewardLoss(load_preference_model(reward))
    text = loss.model.encode_prompts(TWO)
    for shape in ((32, 32), (64, 48), (20, 32)):
        images = pictures(*shape)
        expected = metric(reward, images)
        rounded = reward.model == "pickscore" and shape != (32, 32)
        atol = 2e-3 * loss.model.scale if rounded else 1e-5 * loss.model.scale
        torch.testing.assert_close(-loss(to_unit(images), text), expected, rtol=0, atol=atol)
        assert (expected[0] - expected[1]).abs() > 5 * atol


def test_the_gradient_is_the_scores(reward: RewardConfig) -> None:
    """Against differences in float64, through resizing and padding or cropping."""
    loss = RewardLoss(load_preference_model(reward)).double()
    text = loss.model.encode_prompts(TWO)
    x0 = (to_unit(pictures(24, 40)).double() * 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x0, text).sum(), x0)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    direction = torch.randn(x0.shape, dtype=x0.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        step = 1e-6 * direction
        difference = (loss(x0 + step, text).sum() - loss(x0 - step, text).sum()) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-8)


def test_latents_are_decoded_and_nothing_else_gets_a_gradient(reward: RewardConfig) -> None:
    latents = LatentSpace(tiny_vae(), LatentScaling((0.5, 0.6, 0.7, 0.8), (0.1, 0.0, -0.1, 0.0)), "")
    model = load_preference_model(reward)
    torch.manual_seed(2)
    x0, text = torch.randn(2, 4, 8, 8, requires_grad=True), model.encode_prompts(TWO)
    losses = RewardLoss(model, latents)(x0, text)
    torch.testing.assert_close(losses, RewardLoss(model)(latents.decode(x0), text), rtol=1e-5, atol=1e-4)
    losses.sum().backward()
    assert x0.grad is not None
    assert (x0.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for module in (model, latents.vae) for p in module.parameters())


def test_weights_that_are_not_the_models_are_refused(reward: RewardConfig, tmp_path: Path) -> None:
    file = "HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2"
    if reward.model == "pickscore":
        file = "model.safetensors of https://huggingface.co/yuvalkirstain/PickScore_v1"
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    for path, problem in ((tmp_path / "none.pt", "no such file"), (tmp_path / "a.safetensors", "another architecture")):
        with pytest.raises(CheckpointError, match=rf"^reward\..*{problem}.*take {file} and pass its path$"):
            load_preference_model(reward.model_copy(update={"weights": str(path)}))


def test_a_run_follows_the_preference_and_its_card_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    settings: dict[str, Any] = {
        **SETTINGS,
        "teacher": str(sd15(tmp_path / "sd15")),
        "prompts": str(tmp_path / "prompts.txt"),
        "generator.micro_batch": SETTINGS["batch_size"] // 2,
        "reward.weights": str(tiny_hps(tmp_path, monkeypatch)[0]),
        "reward.gradient_ratio": 0.5,
        "iterations": 1,
    }
    student = distill("digits", output=tmp_path / "run", **settings)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert -100 <= record["generator/reward_loss"] <= 100
    assert record["generator/reward_loss_weight"] > 0
    card = (student / "README.md").read_text(encoding="utf-8")
    assert "| preference_model | hps21: its score is in this student's loss, and is no independent measure" in card

"""Fake score and discriminator that start from checkpoints, as in the second stage of a published run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdistill import distill
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.config.reading import load_config
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints
from fdistill.training.distillation import Distillation
from support.denoisers import tiny_unet

QUICK: dict[str, Any] = {"batch_size": 8, "iterations": 2, "log.samples_every": 0, "log.tracker": "none"}


def built(teacher: Path, **settings: Any) -> Distillation:
    return build(load_config("digits", {"teacher": str(teacher), **QUICK, **settings}), torch.device("cpu"))


def run(teacher: Path, folder: Path, **settings: Any) -> Path:
    distill("digits", output=folder, **{"teacher": str(teacher), **QUICK, **settings})
    return folder


def of_role(folder: Path, role: str) -> dict[str, Tensor]:
    state = load_file(checkpoints(folder / "checkpoints")[-1] / "state.safetensors")
    return {name.removeprefix(f"{role}."): value for name, value in state.items() if name.startswith(f"{role}.")}


@pytest.fixture(scope="module")
def first(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_teacher, tmp_path_factory.mktemp("first") / "run")


@pytest.mark.parametrize("method", ["f-distill", "diffratio"])
@pytest.mark.thorough
def test_roles_start_from_a_runs_last_checkpoint(tiny_teacher: Path, tmp_path: Path, method: str) -> None:
    folder = run(tiny_teacher, tmp_path / "run", method=method)
    starts = {f"{role}.checkpoint": str(folder) for role in ("fake_score", "discriminator")}
    made, plain = built(tiny_teacher, method=method, **starts), built(tiny_teacher, method=method)
    for role in ("fake_score", "discriminator"):
        wanted = of_role(folder, role)
        assert wanted
        for name, value in wanted.items():
            assert torch.equal(made.role(role).state_dict()[name], value), name
        assert any(not torch.equal(plain.role(role).state_dict()[name], value) for name, value in wanted.items())
    assert all(
        torch.equal(value, made.networks.teacher.state_dict()[name])
        for name, value in plain.networks.teacher.state_dict().items()
    )


def test_a_run_goes_on_where_another_ended(tiny_teacher: Path, tmp_path: Path, first: Path) -> None:
    """All roles from the first run's: its fake score has learnt the student's samples, the teacher's copy has not."""
    starts = {
        "student.checkpoint": str(first / "student"),
        "fake_score.checkpoint": str(first),
        "discriminator.checkpoint": str(first),
        "fake_score.lr": 1e-30,
        "discriminator.lr": 1e-30,
        "iterations": 1,
    }
    second = run(tiny_teacher, tmp_path / "second", **starts)
    for role in ("fake_score", "discriminator"):
        one, two = of_role(first, role), of_role(second, role)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-12)


def test_the_fake_score_starts_from_a_folder_of_weights(tiny_teacher: Path, first: Path) -> None:
    made = built(tiny_teacher, **{"fake_score.checkpoint": str(first / "student")})
    weights = load_file(first / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in weights.items():
        assert torch.equal(made.networks.fake_score.state_dict()[f"network.{name}"], value), name
    # What it predicts is read with the teacher's parametrisation.
    x_t, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), torch.arange(4)
    by_hand = copy.deepcopy(made.networks.teacher)
    by_hand.load_state_dict({f"network.{name}": value for name, value in weights.items()})
    torch.testing.assert_close(made.networks.fake_score(x_t, t, labels), by_hand(x_t, t, labels))


@pytest.mark.thorough
def test_adapters_start_from_a_runs_adapters(tiny_teacher: Path, tmp_path: Path) -> None:
    adapters = {"method": "vsd", "fake_score.lora_rank": 2}
    folder = run(tiny_teacher, tmp_path / "run", **adapters)
    made = built(tiny_teacher, **adapters, **{"fake_score.checkpoint": str(folder)})
    wanted = of_role(folder, "fake_score")
    assert all("lora_" in name for name in wanted)
    assert any(bool(value.any()) for name, value in wanted.items() if "lora_B" in name)
    for name, value in wanted.items():
        assert torch.equal(made.networks.fake_score.state_dict()[name], value), name
    with pytest.raises(ConfigError, match=r"a whole network, but fake_score\.lora_rank=2 trains adapters"):
        built(tiny_teacher, **adapters, **{"fake_score.checkpoint": str(folder / "student")})
    with pytest.raises(CheckpointError, match=r"fake_score\.checkpoint .*weights do not fit this architecture"):
        built(tiny_teacher, **{"fake_score.checkpoint": str(folder)})


def test_what_does_not_fit_is_said(tiny_teacher: Path, tmp_path: Path, first: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    wide = tiny_unet(block_out_channels=(48, 64))
    ConsistencyModelPipeline(wide, CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "wide")
    other = tiny_unet(sample_size=16)
    ConsistencyModelPipeline(other, CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "large")
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (empty / name).write_text("")
    no_gan = run(tiny_teacher, tmp_path / "no-gan", method="diff-instruct")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"fake_score.checkpoint": "no/where/there"}, CheckpointError, "no such folder"),
        ({"fake_score.checkpoint": str(tmp_path / "wide")}, CheckpointError, "do not fit this architecture"),
        ({"fake_score.checkpoint": str(tmp_path / "large")}, ConfigError, r"fake_score\.checkpoint .* makes samples"),
        ({"fake_score.checkpoint": str(empty)}, CheckpointError, "a run without a checkpoint yet"),
        ({"discriminator.checkpoint": str(first / "student")}, CheckpointError, "no run's folder"),
        ({"discriminator.checkpoint": str(no_gan)}, CheckpointError, "that run trained no discriminator"),
        (
            {"discriminator.checkpoint": str(first), "discriminator.features": ["down0"]},
            CheckpointError,
            r"discriminator\.checkpoint .*do not fit this architecture",
        ),
        (
            {"discriminator.checkpoint": str(first), "method": "sid"},
            ConfigError,
            r"discriminator\.checkpoint: .*method=sid has no discriminator",
        ),
        (
            {
                "discriminator.checkpoint": str(first),
                "divergence": "rkl",
                "discriminator.gan_weight": 0.0,
                "generator.gan_weight": 0.0,
            },
            ConfigError,
            r"discriminator\.checkpoint: .*no discriminator is trained",
        ),
    ]
    for settings, error, message in cases:
        with pytest.raises(error, match=message):
            built(tiny_teacher, **settings)

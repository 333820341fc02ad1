"""`reuse_samples`: the critic's updates of an iteration share a batch of data and of the student's samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdistill import distill
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.methods import METHODS
from fdistill.step import Networks
from fdistill.training import loop
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints

QUICK: dict[str, Any] = {"batch_size": 12, "iterations": 3, "log.samples_every": 0, "log.tracker": "none"}
#: An eps that keeps Adam from blowing up rounding where a gradient is zero.
EPS = {f"{role}.eps": 1e-3 for role in ("generator", "fake_score", "discriminator")}


def trained(teacher: Path, output: Path, **settings: Any) -> dict[str, Tensor]:
    """The weights of all roles after a run with method DMD2, which is resumed if the folder has one."""
    made = {"teacher": str(teacher), "method": "dmd2", "critic_steps": 3, **QUICK, **EPS, **settings}
    distill("digits", output=output, resume=output.exists(), **made)
    return load_file(checkpoints(output / "checkpoints")[-1] / "state.safetensors")


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the critic's updates as they are made, with `t`, their levels."""
    found: list[dict[str, Any]] = []
    backward = loop.backward

    def kept(update: Any, arguments: Any, *others: Any) -> Any:
        logs = backward(update, arguments, *others)
        if "real_x0" in arguments:
            found.append({**arguments, "t": logs[0]["fake_score/denoising"].t})
        return logs

    monkeypatch.setattr(loop, "backward", kept)
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples of the student each draw makes."""
    found: list[int] = []
    draw = Networks.draw_samples

    def counted(networks: Networks, generator: torch.Generator, batch: int, *others: Any) -> Tensor:
        found.append(batch)
        return draw(networks, generator, batch, *others)

    monkeypatch.setattr(Networks, "draw_samples", counted)
    return found


def test_updates_share_samples_and_data_at_new_levels(
    tiny_teacher: Path, tmp_path: Path, updates: list[dict[str, Any]], drawn: list[int]
) -> None:
    trained(tiny_teacher, tmp_path / "run", reuse_samples=True, iterations=2)
    assert drawn == [12, 12] * 2  # for the critic's three updates, and for the student's
    first, second = updates[:3], updates[3:]
    for shared in (first, second):
        assert len(shared) == 3
        for key in ("fake_x0", "real_x0", "condition"):
            assert all(torch.equal(each[key], shared[0][key]) for each in shared), key
        assert len({tuple(each["t"].tolist()) for each in shared}) == 3
    assert not torch.equal(first[0]["fake_x0"], second[0]["fake_x0"])
    assert not torch.equal(first[0]["real_x0"], second[0]["real_x0"])


@pytest.mark.thorough
def test_with_one_update_nothing_changes(tiny_teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"critic_steps": 1, "student_level": [2.5, 0.5]}
    plain = trained(tiny_teacher, tmp_path / "plain", **settings)
    assert equal(plain, trained(tiny_teacher, tmp_path / "reused", reuse_samples=True, **settings))
    settings["critic_steps"] = 2
    plain = trained(tiny_teacher, tmp_path / "two", **settings)
    assert not equal(plain, trained(tiny_teacher, tmp_path / "two-reused", reuse_samples=True, **settings))


def test_parts_are_the_whole(tiny_teacher: Path, tmp_path: Path) -> None:
    whole = trained(tiny_teacher, tmp_path / "whole", reuse_samples=True, iterations=2)
    parts = trained(tiny_teacher, tmp_path / "parts", reuse_samples=True, iterations=2, **{"fake_score.micro_batch": 4})
    for name, value in whole.items():
        if name.startswith(("generator.", "fake_score.", "discriminator.")):
            torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_resumed_in_a_stage_that_reuses_equals_uninterrupted(
    tiny_teacher: Path, tmp_path: Path, updates: list[dict[str, Any]]
) -> None:
    """A stage that reuses samples reads one batch an iteration; the next goes on with the data where it ended."""
    stages = [{"iterations": 3, "reuse_samples": True}, {"iterations": 1}]
    settings: dict[str, Any] = {"stages": stages, "log.checkpoint_every": 2, "iterations": 4}
    straight = trained(tiny_teacher, tmp_path / "run", **settings)
    real = [tuple(each["real_x0"].flatten().tolist()) for each in updates]
    assert len(set(real)) == 3 + 3
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert equal(straight, trained(tiny_teacher, tmp_path / "run", **settings))
    assert [tuple(each["real_x0"].flatten().tolist()) for each in updates[12:]] == real[6:]


def test_diffratio_reuses_samples_too(tiny_teacher: Path, tmp_path: Path, drawn: list[int]) -> None:
    trained(tiny_teacher, tmp_path / "run", method="diffratio", reuse_samples=True, iterations=2)
    assert drawn == [12, 12] * 2


def other_critic(networks: Networks, real_x0: Tensor, condition: Any, generator: torch.Generator) -> Any:
    """Takes no samples that were drawn before."""


def test_a_critic_that_cannot_reuse_is_refused(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"teacher": str(tiny_teacher), "method": "dmd2", "reuse_samples": True}
    config = load_config("digits", settings)
    monkeypatch.setitem(METHODS, "dmd2", replace(METHODS["dmd2"], critic=f"{__name__}:other_critic"))
    with pytest.raises(ConfigError, match=r"takes no fake_x0, .*reuse_samples must be false"):
        build(config, torch.device("cpu"))
    without = [name for name, method in METHODS.items() if method.critic is None]
    with pytest.raises(ConfigError, match=r"reuse_samples: got true, but method=.* trains no critic"):
        load_config("digits", {"method": without[0], "reuse_samples": True})

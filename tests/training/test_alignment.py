"""Implicit distribution alignment: the fake score's weights after the student's updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdistill import distill
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.training.alignment import align
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints

QUICK: dict[str, Any] = {"batch_size": 8, "log.samples_every": 0, "log.tracker": "none"}


def built(teacher: Path, **settings: Any) -> Any:
    return build(load_config("digits", {"teacher": str(teacher), **QUICK, **settings}), torch.device("cpu"))


def test_weights_are_averaged(tiny_teacher: Path) -> None:
    made = built(tiny_teacher)
    random = torch.Generator().manual_seed(0)
    for parameter in made.student.parameters():
        parameter.data += torch.randn(parameter.shape, generator=random)
    before = {name: value.clone() for name, value in made.networks.fake_score.named_parameters()}
    student = {name: value.clone() for name, value in made.student.denoiser.named_parameters()}
    align(made.networks, 0.03)
    for name, value in made.networks.fake_score.named_parameters():
        torch.testing.assert_close(value.data, 0.97 * before[name] + 0.03 * student[name])
        assert not torch.equal(value, before[name])
    for name, value in made.student.denoiser.named_parameters():
        assert torch.equal(value, student[name])


def roles(folder: Path, iteration: int) -> dict[str, dict[str, Tensor]]:
    (found,) = (each for each in checkpoints(folder / "checkpoints") if each.name.endswith(str(iteration)))
    state = load_file(found / "state.safetensors")
    prefixes = {"student": "generator.denoiser.", "fake": "fake_score."}
    return {
        role: {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for role, prefix in prefixes.items()
    }


def test_a_run_aligns_after_the_students_update(tiny_teacher: Path, tmp_path: Path) -> None:
    """With a share of 1 the fake score ends as the student; in a stage without it, it does not."""
    stages = [{"iterations": 2, "fake_score.alignment": 1.0}, {"iterations": 1}]
    settings: dict[str, Any] = {"teacher": str(tiny_teacher), "stages": stages, "log.checkpoint_every": 1, **QUICK}
    distill("digits", output=tmp_path / "run", method="sid", **settings)
    aligned, later = roles(tmp_path / "run", 2), roles(tmp_path / "run", 3)
    assert aligned["fake"].keys() == aligned["student"].keys()
    for name, value in aligned["fake"].items():
        assert torch.equal(value, aligned["student"][name]), name
    assert any(not torch.equal(value, later["student"][name]) for name, value in later["fake"].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student.lora_rank": 4}, "fake_score.alignment: got 0.02, but adapters cannot be averaged"),
        ({"fake_score.lora_rank": 4}, "fake_score.alignment: got 0.02, but adapters cannot be averaged"),
        ({"student.network": {"layers_per_block": 2}}, "the student's network has other weights"),
        ({"method": "diffratio"}, "method=diffratio trains no fake score"),
    ],
)
def test_where_weights_do_not_mean_the_same_it_is_refused(
    tiny_teacher: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        built(tiny_teacher, **{"fake_score.alignment": 0.02, **settings})

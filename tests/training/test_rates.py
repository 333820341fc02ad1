"""Learning rates over a run: torch's own schedulers give the same, and each role's optimiser gets its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from fdistill import distill
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.config.sections import OptimizerConfig
from fdistill.training.checkpoint import checkpoints
from fdistill.training.journal import read_records
from fdistill.training.rates import learning_rate
from support.thorough import at_night

QUICK: dict[str, Any] = {
    "batch_size": 8,
    "iterations": 4,
    "log.every": 1,
    "log.samples_every": 0,
    "log.checkpoint_every": 0,
    "log.tracker": "none",
    "generator.lr_warmup": 0,
    "fake_score.lr_warmup": 0,
}


HOLD = 4


def torchs(schedule: str, warmup: int, iterations: int) -> list[float]:
    """The rates of torch's schedulers, one after the other; lr is 3e-4."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=3e-4)
    left = iterations - warmup
    after: LRScheduler = {
        "constant": lambda: LambdaLR(optimizer, lambda _: 1.0),
        "linear": lambda: LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=left),
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=left),
        "inverse-sqrt": lambda: LambdaLR(optimizer, lambda i: 1.0 if i < HOLD else (i / HOLD) ** -0.5),
    }[schedule]()
    scheduler = after
    if warmup:
        rising = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=max(1, warmup - 1))
        scheduler = SequentialLR(optimizer, [rising, after], milestones=[warmup])
    found = []
    for _ in range(iterations):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse-sqrt"])
def test_rates_are_those_of_torchs_schedulers(schedule: Any, warmup: int) -> None:
    section = OptimizerConfig(lr=3e-4, lr_schedule=schedule, lr_warmup=warmup, lr_hold=HOLD)
    found = [learning_rate(section, i, 20) for i in range(20)]
    assert found == pytest.approx(torchs(schedule, warmup, 20), rel=1e-9)
    assert max(found) == found[warmup] == 3e-4
    assert min(found) > 0


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(folder / "checkpoints")[-1] / "state.safetensors")


def run(teacher: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    resume = bool(settings.pop("resume", False))
    distill("digits", output=folder, resume=resume, **{"teacher": str(teacher), **QUICK, **settings})
    return state(folder)


@pytest.mark.parametrize(
    "role", at_night(["generator", "fake_score", "discriminator"], lambda role: role != "generator")
)
def test_the_first_of_two_warm_up_iterations_has_half_the_rate(tiny_teacher: Path, tmp_path: Path, role: str) -> None:
    warm = run(tiny_teacher, tmp_path / "warm", iterations=1, **{f"{role}.lr": 2e-3, f"{role}.lr_warmup": 2})
    half = run(tiny_teacher, tmp_path / "half", iterations=1, **{f"{role}.lr": 1e-3})
    whole = run(tiny_teacher, tmp_path / "whole", iterations=1, **{f"{role}.lr": 2e-3})
    assert all(torch.equal(warm[name], half[name]) for name in half)
    assert any(not torch.equal(warm[name], whole[name]) for name in whole)


@pytest.mark.thorough
def test_a_resumed_run_goes_on_at_its_rate(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {"generator.lr_schedule": "cosine", "fake_score.lr_warmup": 3, "log.checkpoint_every": 2}
    straight = run(tiny_teacher, tmp_path / "straight", **settings)
    folder = tmp_path / "straight"
    for made in checkpoints(folder / "checkpoints")[1:]:
        made.rename(tmp_path / "last")
    resumed = run(tiny_teacher, folder, resume=True, **settings)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    records = read_records(folder / "metrics.jsonl")
    config = load_config(str(folder / "config.yaml"))
    rates = {name: [record[f"{name}/lr"] for record in records] for name in ("generator", "fake_score")}
    assert rates["generator"] == pytest.approx([4e-4 * f for f in (1, 0.853553, 0.5, 0.146447)], rel=1e-5)
    assert rates["fake_score"] == pytest.approx([config.fake_score.lr * k / 3 for k in (1, 2, 3, 3)])
    assert not any("discriminator/lr" in record for record in records)  # it does not change

    with pytest.raises(ConfigError, match="iterations: 4 -> 6"):
        run(tiny_teacher, folder, resume=True, **{**settings, "iterations": 6})


@pytest.mark.thorough
def test_a_rate_that_needs_no_end_lets_a_run_be_longer(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {"generator.lr_schedule": "inverse-sqrt", "generator.lr_hold": 2, "iterations": 6}
    straight = run(tiny_teacher, tmp_path / "straight", **settings)
    run(tiny_teacher, tmp_path / "longer", **{**settings, "iterations": 3})
    longer = run(tiny_teacher, tmp_path / "longer", resume=True, **settings)
    assert all(torch.equal(straight[name], longer[name]) for name in straight)


def test_a_rate_needs_iterations_to_fall_in() -> None:
    settings = {"iterations": 4, "generator.lr_warmup": 4}
    with pytest.raises(ConfigError, match=r"generator\.lr_warmup: got 4 of 4 iterations, which leaves none"):
        load_config("digits", {**settings, "generator.lr_schedule": "linear"})
    assert load_config("digits", settings).generator.lr_warmup == 4
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        load_config("digits", {"fake_score.lr_schedule": "cosin"})

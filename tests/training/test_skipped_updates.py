"""Updates whose loss or gradient is not finite: skipped, counted, and the end of the run where there are too many."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fdistill import distill
from fdistill.base.errors import NonFiniteError
from fdistill.config.sections import OptimizerConfig
from fdistill.step import StepResult
from fdistill.training.batches import Batches
from fdistill.training.checkpoint import checkpoints
from fdistill.training.journal import read_records
from fdistill.training.optimise import Role
from fdistill.training.parts import Split, backward

QUICK = {"batch_size": 8, "iterations": 8, "log.every": 1, "log.samples_every": 0, "log.checkpoint_every": 1}


def run(teacher: Path, output: Path, *, resume: bool = False, **changes: Any) -> Path:
    settings = {"teacher": str(teacher), "device": "cpu", "log.tracker": "none", **QUICK, **changes}
    return distill("digits", output=output, resume=resume, **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_update_leaves_no_trace(value: float) -> None:
    """Neither in the weights nor in the optimiser: what follows is as if it had never been."""

    def trained(gradients: list[float]) -> tuple[nn.Linear, dict[str, Any]]:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        role = Role(module, optimizer)
        role.settle(OptimizerConfig(weight_decay=0.1), 0.01)
        for gradient in gradients:
            module(torch.ones(1, 3)).sum().backward()
            module.bias.grad[0] = gradient
            before = module.weight.detach().clone()
            norm = role.step()
            assert bool(norm.isfinite()) == math.isfinite(gradient)
            assert torch.equal(module.weight, before) == (not math.isfinite(gradient))
            assert module.bias.grad is None
        return module, optimizer.state_dict()["state"]

    (one, first), (two, second) = trained([value, 1.0, value, value, -2.0]), trained([1.0, -2.0])
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_is_seen_though_its_gradient_is() -> None:
    for spoilt in (0.0, math.inf):
        weight = torch.ones(3, requires_grad=True)
        backward(lambda s=spoilt, w=weight, **_: StepResult(w.sum() + s, {}), {}, torch.Generator(), Split(1, "fp32"))
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all()) is not bool(spoilt)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Makes a sample of some of the critic's updates NaN, counted from 0."""
    critic = Batches.critic

    def poison(updates: range) -> None:
        count = iter(range(1000))

        def of_critic(self: Batches, number: int) -> dict[str, Any]:
            arguments = critic(self, number)
            if next(count) in updates:
                arguments["real_x0"][0, 0, 0, 0] = math.nan
            return arguments

        monkeypatch.setattr(Batches, "critic", of_critic)

    return poison


def test_an_update_that_is_not_finite_is_skipped_and_counted(
    tiny_teacher: Path, tmp_path: Path, poisoned: Callable[[range], None]
) -> None:
    """One process. Its state stays finite, and all of it goes on."""
    poisoned(range(2, 3))
    with pytest.warns(UserWarning, match=r"iteration 2: discriminator: .* at iteration 2, batch 3; that update was sk"):
        run(tiny_teacher, tmp_path / "run", iterations=3)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record.get("discriminator/skipped") for record in records] == [None, 1, None]
    assert [record.get("fake_score/skipped") for record in records] == [None, 1, None]
    (checkpoint, last) = checkpoints(tmp_path / "run" / "checkpoints")
    one, two = (load_file(path / "state.safetensors") for path in (checkpoint, last))
    assert all(bool(value.isfinite().all()) for value in two.values())
    assert one["optimizer.fake_score.0.step"] == 3  # of four updates
    assert one["optimizer.generator.0.step"] == 2
    assert not torch.equal(one["optimizer.fake_score.0.exp_avg_sq"], two["optimizer.fake_score.0.exp_avg_sq"])


@pytest.mark.thorough
def test_too_many_skipped_updates_end_a_run(
    tiny_teacher: Path, tmp_path: Path, poisoned: Callable[[range], None]
) -> None:
    """No checkpoint is written from the first of them on, so that --resume begins before it."""
    folder = tmp_path / "run"
    settings = {"max_skipped": 5}
    poisoned(range(2, 1000))
    with pytest.warns(UserWarning, match="was skipped"), pytest.raises(NonFiniteError) as caught:
        run(tiny_teacher, folder, **settings)
    message = str(caught.value)
    assert re.search(
        r"stopped at iteration 4: \w+: \w+ became nan at noise level t = .* at iteration 2, batch 3", message
    )
    assert "from there on all 5 updates of " in message
    assert f"last good checkpoint is {folder}/checkpoints/000001; to go on, add --resume " in message
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["000001"]
    poisoned(range(0))
    run(tiny_teacher, folder, resume=True, **settings | {"max_skipped": 3})

"""What makes a run smaller: frozen weights in few bits, and AdamW's moments in 8."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fdistill import distill
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.config.reading import load_config
from fdistill.config.sections import OptimizerConfig
from fdistill.training import adamw_8bit
from fdistill.training.build import build
from fdistill.training.checkpoint import optimizer_tensors, own_chunks, prepare_optimizer, save_checkpoint
from fdistill.training.optimise import Role
from fdistill.training.sharding import gathered, shard
from support.extras import needs_bitsandbytes

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ROLES = ("generator", "fake_score", "discriminator")
SMALL: dict[str, Any] = {
    "precision": "bf16",
    "frozen_precision": "nf4",
    "gradient_checkpointing": True,
    "student.lora_rank": 64,
    "student.lora_targets": ["conv1", "to_q"],
    "fake_score.lora_rank": 4,
    "fake_score.lora_targets": ["to_q"],
    **{f"{role}.optimizer": "adamw-8bit" for role in ROLES},
}


def stepped(optimizer: torch.optim.Optimizer, layer: nn.Linear, steps: range) -> None:
    for step in steps:
        layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(step))
        layer.bias.grad = torch.ones_like(layer.bias) / (step + 1)
        optimizer.step()


def pair(**settings: Any) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A layer whose weight has moments in 8 bits, and whose bias has them in float32."""
    torch.manual_seed(0)
    layer = nn.Linear(80, 70)
    return layer, adamw_8bit.make(layer.parameters(), "generator.optimizer", lr=1e-2, betas=(0.5, 0.9), **settings)


@needs_bitsandbytes
def test_it_steps_as_adamw_does_in_a_quarter_of_the_memory() -> None:
    layer, optimizer = pair(weight_decay=0.1)
    stepped(optimizer, layer, range(10))
    torch.manual_seed(0)
    whole = nn.Linear(80, 70)
    start = whole.weight.detach().clone()
    stepped(torch.optim.AdamW(whole.parameters(), 1e-2, (0.5, 0.9), weight_decay=0.1), whole, range(10))
    moved = (whole.weight - start).norm()
    assert (layer.weight - whole.weight).norm() < 0.05 * moved
    torch.testing.assert_close(layer.bias, whole.bias)
    assert adamw_8bit.state_bytes(layer.weight) < 0.26 * 2 * 4 * layer.weight.numel()
    assert adamw_8bit.state_bytes(layer.bias) == 2 * 4 * layer.bias.numel()


@needs_bitsandbytes
def test_its_state_is_plain_tensors_that_another_one_goes_on_from() -> None:
    layer, optimizer = pair()
    stepped(optimizer, layer, range(3))
    stored = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    tensors = dict(stored)
    for index, parameter in enumerate(layer.parameters()):
        for name, like in adamw_8bit.state_like(parameter).items():
            found = tensors.pop(f"{index}.{name}")
            assert (type(found), found.shape, found.dtype) == (torch.Tensor, like.shape, like.dtype), name
    assert not tensors
    other, resumed = pair()
    other.load_state_dict(layer.state_dict())
    prepare_optimizer(resumed, {f"optimizer.{name}" for name in stored}, "optimizer")
    for name, value in optimizer_tensors(resumed).items():
        value.copy_(stored[name])
    stepped(optimizer, layer, range(3, 6))
    stepped(resumed, other, range(3, 6))
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
    assert adamw_8bit.as_tensors({"step": 3})["step"].dtype == torch.int64


@needs_bitsandbytes
def test_a_small_run_resumed_equals_an_uninterrupted_one_bit_by_bit(tiny_teacher: Path, tmp_path: Path) -> None:
    def run(output: str, **changes: Any) -> Path:
        quick = {"batch_size": 8, "iterations": 2, "log.samples_every": 0, "log.checkpoint_every": 1}
        return distill(
            "digits",
            output=tmp_path / output,
            **{"teacher": str(tiny_teacher), **quick, "log.tracker": "none", **SMALL, **changes},
        )

    straight = load_file(run("straight") / WEIGHTS)
    run("resumed", iterations=1)
    resumed = load_file(run("resumed", resume=True) / WEIGHTS)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


@needs_bitsandbytes
def test_moments_in_8_bits_are_not_taken_for_others_nor_others_for_them(tiny_teacher: Path, tmp_path: Path) -> None:
    runs = {}
    for kind in ("adamw", "adamw-8bit"):
        settings = {"teacher": str(tiny_teacher), **SMALL, "generator.optimizer": kind}
        run = runs[kind] = build(load_config("digits", settings), torch.device("cpu"))
        for parameter in run.student.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        Role(run.student, run.optimizers["generator"]).step()
        state = {name: value.clone() for name, value in run.state().items()}
        save_checkpoint(tmp_path / kind, 1, own_chunks(state), {}, 1)
    for kind, other, found in (("adamw", "adamw-8bit", "int64"), ("adamw-8bit", "adamw", "float32")):
        with pytest.raises(CheckpointError, match=rf"optimizer\.generator\.0\.step is {found} .* expected one of this"):
            runs[kind].load_state(tmp_path / other / "000001", 0)
        runs[kind].load_state(tmp_path / kind / "000001", 0)


@needs_bitsandbytes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_leaves_weights_and_moments_as_they_are(value: float) -> None:
    """What follows is as if it had never been."""

    def trained(gradients: list[float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        layer, optimizer = pair()
        role = Role(layer, optimizer)
        role.settle(OptimizerConfig(weight_decay=0.1), 0.01)
        for gradient in gradients:
            layer(torch.ones(1, 80)).square().sum().backward()
            layer.bias.grad[0] = gradient
            before = {**layer.state_dict(), **optimizer_tensors(optimizer)}
            before = {name: value.clone() for name, value in before.items()}
            assert bool(role.step().isfinite()) == math.isfinite(gradient)
            after = {**layer.state_dict(), **optimizer_tensors(optimizer)}
            kept = before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in after)
            assert kept is not math.isfinite(gradient)
            assert layer.weight.grad is None
        return layer.state_dict(), optimizer_tensors(optimizer)

    skipped, straight = trained([value, 1.0, value, value, -2.0]), trained([1.0, -2.0])
    torch.testing.assert_close(skipped, straight, rtol=0, atol=0)


@needs_bitsandbytes
def test_of_several_processes_each_updates_its_own_copy(mesh: DeviceMesh) -> None:
    """As weights that are distributed, which bitsandbytes does not know."""

    def trained(*, distributed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        layer = nn.Linear(80, 70)
        if distributed:
            shard(layer, mesh)
        optimizer = adamw_8bit.make(layer.parameters(), "generator.optimizer")
        role = Role(layer, optimizer)
        role.settle(OptimizerConfig(weight_decay=0.1), 0.01)
        for size in (1, 2, 3):
            layer(torch.full((1, 80), float(size))).square().sum().backward()
            role.step()
            assert layer.weight.grad is None
        return gathered(layer.state_dict(), keep=True), optimizer_tensors(optimizer)

    torch.testing.assert_close(trained(distributed=True), trained(distributed=False), rtol=0, atol=0)


def test_settings_that_need_bf16_or_bitsandbytes_say_so(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="frozen_precision: got fp8, but precision=fp32; expected precision=bf16"):
        load_config("digits", {"frozen_precision": "fp8"})
    with pytest.raises(ConfigError, match=r"generator.optimizer: cannot change during a run"):
        load_config("digits", {"stages": [{"iterations": 1, "generator.optimizer": "adamw-8bit"}]})
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    config = load_config("digits", {"teacher": str(tiny_teacher), "fake_score.optimizer": "adamw-8bit"})
    with pytest.raises(
        ConfigError, match=r"fake_score.optimizer: .*'fdistill\[quantised\]'.*fake_score.optimizer=adamw"
    ):
        build(config, torch.device("cpu"))

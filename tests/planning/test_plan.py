"""`fdistill plan`: what it counts, how runs are spread, what it says of time, and that its advice holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.commands.cli import app
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.planning.counting import STUDENT
from fdistill.planning.fake_tensors import Live, fake
from fdistill.planning.placement import Footprint, Placement, footprint, on_a_device
from fdistill.planning.plan import Hardware, Plan, make_plan
from fdistill.planning.rates import Rates, seconds, traffic
from fdistill.planning.weightless import open_without_weights, run_without_weights
from fdistill.training.sharding import blocks

MACHINE = 8
RATES = Rates(tflops=75, link=450, network=50)
SMALL = {"batch_size": 32, "critic_steps": 1}


def planned(config: DistillConfig, gpus: int = 1, memory: int | None = None) -> Plan:
    said: list[str] = []
    return make_plan(config, Hardware(gpus, MACHINE, memory, RATES), said.append)


@pytest.fixture(scope="module")
def digits() -> Footprint:
    config = load_config("digits", SMALL)
    return footprint(run_without_weights(config, open_without_weights(config)), 1)


def configs_alone(folder: Path) -> Path:
    """The embedded teacher of the digits without its weights."""
    shutil.copytree(EMBEDDED_TEACHERS["digits"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_nothing_has_values() -> None:
    config = load_config("digits", SMALL)
    run = run_without_weights(config, open_without_weights(config))
    parameters = [parameter for role in run.optimizers for parameter in run.role(role).parameters()]
    assert all(isinstance(parameter, FakeTensor) for parameter in parameters)
    assert sum(parameter.numel() for parameter in run.role("fake_score").parameters()) == 652_321


def test_operations_are_those_of_torchs_counter() -> None:
    """Of convolutions and matrices, forward and backward; of attention, whose form on the CPU torch leaves out."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    images = torch.randn(4, 3, 8, 8)
    with FlopCounterMode(display=False) as expected:
        network(images).sum().backward()
    with Live() as live:
        network(images).sum().backward()
    assert live.flops == expected.get_total_flops() > 0
    with fake():
        query = torch.zeros(2, 4, 16, 8, requires_grad=True)
        with Live() as attention:
            nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    product = 2 * 2 * 4 * 16 * 16 * 8  # one of the two matrix products forward; five backward
    assert attention.flops == 7 * product


def test_gradients_and_casts_are_told_apart() -> None:
    layer, first = nn.Linear(100, 100, bias=False), torch.randn(1, 100)
    with Live([layer.weight, first], [layer.weight]) as live, live.gradients_of([layer.weight]):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = layer(first).square().mean()
        loss.backward()
        torch.zeros(1)
    assert max(cast for _, cast in live.front) == 2 * 100 * 100
    assert max(gradient for gradient, _ in live.front) == 4 * 100 * 100


def test_a_hub_id_needs_no_more_than_configs_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "models--someone--digits"
    configs_alone(stored / "snapshots" / "0123456789")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123456789", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_without_weights(load_config("digits", {"teacher": "someone/digits"})).denoiser.num_classes == 10
    with pytest.raises(CheckpointError, match="'someone/else': no such folder, and the hub gave no model of that id"):
        open_without_weights(load_config("digits", {"teacher": "someone/else"}))


@pytest.mark.parametrize(
    ("teacher", "error", "said"),
    [
        ("teachers/of/nobody", CheckpointError, "no such folder"),
        ("os:getcwd", ConfigError, "is a function, and a plan reads configs"),
        ("FILE", ConfigError, "is a file, and a plan reads configs; expected teacher_base"),
        ("BROKEN", CheckpointError, "no network can be built from it"),
    ],
)
def test_a_teacher_that_is_not_there(teacher: str, error: type[Exception], said: str, tmp_path: Path) -> None:
    if teacher == "FILE":
        teacher = str(tmp_path / "model.safetensors")
        Path(teacher).write_bytes(b"")
    if teacher == "BROKEN":
        folder = configs_alone(tmp_path / "broken")
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "down_block_types": ["NoBlock2D"]}))
        teacher = str(folder)
    with pytest.raises(error, match=said):
        open_without_weights(load_config("digits", {"teacher": teacher}))


def test_what_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="batch_size: 32 does not divide among 3 GPUs"):
        planned(load_config("digits", SMALL), gpus=3)


def test_shards_and_the_cpus_memory(digits: Footprint) -> None:
    whole, halves = (on_a_device(digits, Placement(2, MACHINE, parallel)) for parallel in ("ddp", "fsdp"))
    assert whole.held == sum(row.total - row.gradients for row in digits.rows)
    assert halves.held == pytest.approx(whole.held / 2, rel=1e-6)
    assert (whole.gathered, halves.gathered > 0) == (0, True)
    assert halves.activations == whole.activations
    for parallel, shards in (("ddp", 1), ("fsdp", 2)):  # later parts find the gradients of those before them
        parts = on_a_device(digits, Placement(2, MACHINE, parallel), in_parts=True)
        assert parts.gradients[STUDENT] == digits.rows[1].gradients // shards
    assert on_a_device(digits, Placement(16, MACHINE, "hybrid")).held == pytest.approx(whole.held / 8, rel=1e-5)
    moved = on_a_device(digits, Placement(1, MACHINE, offload_frozen=True, offload_optimizers=True))
    assert (moved.held, moved.host) == (0, sum(row.total for row in digits.rows))
    narrow = on_a_device(digits, Placement(1, MACHINE, optimizer="adamw-8bit"))
    trained = sum(row.trained for row in digits.rows)
    assert whole.held - narrow.held == pytest.approx(trained * (8 - 2 - 2 * 4 / 256), abs=4)
    stored = on_a_device(digits, Placement(1, MACHINE, frozen_precision="nf4"))
    assert whole.held - stored.held == pytest.approx(digits.storable * (4 - 0.5 - 4 / 64), abs=1)


def test_traffic_is_what_the_formulas_say(digits: Footprint) -> None:
    size = {row.role: row.gradients for row in digits.rows}

    def sent(gpus: int, parallel: str, role: str) -> tuple[float, float]:
        (found,) = (each for each in traffic(digits, Placement(gpus, MACHINE, parallel)) if each.role == role)
        return found.inside, found.between

    assert sent(4, "ddp", "student") == (pytest.approx(2 * 3 / 4 * size["student"]), 0)
    assert sent(4, "ddp", "teacher") == sent(1, "fsdp", "student") == (0, 0)
    assert sent(64, "ddp", "student") == (0, pytest.approx(2 * 63 / 64 * size["student"]))
    # The student runs once without a gradient for the critic, and once with one for itself: three gathers.
    assert sent(4, "fsdp", "student") == (pytest.approx(3 / 4 * (3 + 1) * size["student"]), 0)
    assert sent(64, "hybrid", "student") == (
        pytest.approx(7 / 8 * (3 + 1) * size["student"]),
        pytest.approx(2 * 7 / 8 * size["student"] / 8),
    )


def test_seconds(digits: Footprint) -> None:
    alone, many = Placement(1, MACHINE), Placement(64, MACHINE)
    operations = sum(update.flops * update.times for update in digits.updates.values())
    assert seconds(digits, alone, RATES).compute == pytest.approx(operations / 75e12)
    assert seconds(digits, alone, RATES).communication == 0
    measured = seconds(digits, many, replace(RATES, seconds=3.0), scale=0.5)
    assert measured.compute == 1.5
    assert measured.communication == pytest.approx(sum(each.between for each in traffic(digits, many)) / 50e9)
    assert measured.apart == measured.overlapped + measured.communication


def test_blocks_cover_most_of_a_network() -> None:
    run_config = load_config("digits")
    network = open_without_weights(run_config).denoiser

    def elements(modules: list[nn.Module]) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert 0.8 * elements([network]) < elements(blocks(network)) < elements([network])


def test_parts_and_more_gpus() -> None:
    """Parts of 8 need what a batch of 8 needs, beside the gradients; the table says it of a GPU among four."""
    whole = planned(load_config("digits-regression", {"batch_size": 32}))
    parts = planned(load_config("digits-regression", {"batch_size": 32, "generator.micro_batch": 8}))
    update = parts.found.updates[STUDENT]
    assert (update.samples, update.parts) == (8, 4)
    assert parts.flops == pytest.approx(whole.flops, rel=1e-3)
    small = planned(load_config("digits-regression", {"batch_size": 8}))
    gradients = max(parts.device.gradients.values())
    assert small.device.total < parts.device.total < small.device.total + 2 * gradients
    (among_four,) = (row for row in whole.table if row.gpus == 4)
    assert among_four.device is not None
    assert among_four.device.total == pytest.approx(small.device.total, rel=0.05)
    assert [row.samples for row in whole.table] == [32, 16, 8, 4, 2, 1, None, None, None, None]


def test_advice_holds() -> None:
    """Every setting that is said to make a run fit does, and the run as it is does not."""
    config = load_config("digits-regression", {"batch_size": 64})
    memory = int(0.75 * planned(config).device.total)
    plan = planned(config, memory=memory)
    assert plan.remedies is not None
    names = {text.partition("=")[0] for remedy in plan.remedies for text in remedy.settings}
    assert names >= {"gradient_checkpointing", "generator.micro_batch"}
    for remedy in plan.remedies:
        changed = load_config("digits-regression", ["batch_size=64", *remedy.settings])
        total = planned(changed).device.total
        assert total == pytest.approx(remedy.bytes, rel=0.03)
        assert total <= 1.03 * memory
    assert planned(config, memory=10**9).remedies is None


def test_the_command(tmp_path: Path) -> None:
    arguments = ["plan", "digits", *(f"{key}={value}" for key, value in SMALL.items()), "--gpus", "4"]
    done = CliRunner().invoke(app, [*arguments, "--memory", "1", "--output", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.exception or done.output
    assert "4 GPUs with 8 samples each, parallel=ddp" in done.output
    assert "Fits 1 GB." in done.output
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["per_gpu"]["total"] > facts["per_gpu"]["held"] > 0
    assert [row["gpus"] for row in facts["table"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]

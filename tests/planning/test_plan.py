"""`fdistill plan`: what it counts, how runs are spread, what it says of time, and that its advice holds."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fdistill.adapters import quantised_layers
from fdistill.adapters.quantised_layers import KINDS, encode
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.commands.cli import app
from fdistill.commands.plan_text import as_text
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.planning.counting import CRITIC, STUDENT
from fdistill.planning.fake_tensors import Live, fake, few_bits_by_size
from fdistill.planning.gathers import measure
from fdistill.planning.placement import Footprint, Placement, on_a_device
from fdistill.planning.plan import Hardware, Plan, make_plan
from fdistill.planning.rates import Rates, seconds, traffic
from fdistill.planning.weightless import open_without_weights, run_without_weights
from fdistill.students.lora import lora_copy
from fdistill.training.build import build
from support.extras import needs_bitsandbytes
from support.planned import digits as counted_digits
from support.planned import digits_run

MACHINE = 8
RATES = Rates(tflops=75, link=450, network=50)
WARM_UP = ("batch_size=32", "precision=bf16", "frozen_precision=bf16")


def planned(config: DistillConfig, gpus: int = 1, memory: int | None = None) -> Plan:
    said: list[str] = []
    return make_plan(config, Hardware(gpus, MACHINE, memory, RATES), said.append)


@functools.cache
def warm_up(*settings: str, memory: int | None = None) -> Plan:
    """Of a run in which only the student is updated."""
    return planned(load_config("digits-regression", [*WARM_UP, *settings]), memory=memory)


def tight() -> Plan:
    """Of one that does not fit."""
    return warm_up(memory=19_300_000)


def configs_alone(folder: Path) -> Path:
    """The embedded teacher of the digits without its weights."""
    shutil.copytree(EMBEDDED_TEACHERS["digits"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_nothing_has_values() -> None:
    run = digits_run()
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
    with pytest.raises(ConfigError, match="batch_size: 64 does not divide among 3 GPUs"):
        planned(load_config("digits"), gpus=3)
    with pytest.raises(ConfigError, match="hybrid needs whole machines of 8 GPUs, got 12"):
        planned(load_config("digits", {"parallel": "hybrid", "batch_size": 24}), gpus=12)


def share(footprint: Footprint, role: str, shards: int) -> float:
    return footprint.networks[role].weights.share(shards)


def test_the_first_process_has_the_most_rows() -> None:
    """Of 10 rows of 3, and of 3 biases, among 4 and 16 processes: what torch.chunk gives the first one."""
    sizes = measure(nn.Sequential(nn.Linear(3, 10, bias=False), nn.Linear(10, 3))).weights
    assert (sizes.inside, sizes.outside) == (0, 63)
    assert sizes.share(4) == pytest.approx((3 * 3 + 10 + 1) / 63)
    assert sizes.share(16) == pytest.approx((3 + 10 + 1) / 63)


@pytest.mark.thorough
def test_shards_and_the_cpus_memory() -> None:
    digits = counted_digits()
    whole, halves = (on_a_device(digits, Placement(2, MACHINE, parallel)) for parallel in ("ddp", "fsdp"))
    assert whole.held == sum(row.total - row.gradients for row in digits.rows)
    assert 0.5 <= halves.held / whole.held < 0.51
    assert halves.activations == whole.activations
    assert on_a_device(digits, Placement(1, MACHINE)).gathered == 0
    # Copies of blocks: the teacher's too if it is sharded, but not if it is whole.
    assert 0 < whole.gathered <= halves.gathered
    student = digits.networks["student"].trained
    assert whole.gathered == 4 * (4 * student.largest + 2 * student.outside)
    for parallel in ("ddp", "fsdp"):  # later parts find the gradients of those before them, not yet in shards
        parts = on_a_device(digits, Placement(2, MACHINE, parallel), in_parts=True)
        assert parts.gradients[STUDENT] == digits.rows[1].gradients
    eighth = on_a_device(digits, Placement(16, MACHINE, "hybrid")).held / whole.held
    assert 1 / 8 <= eighth < 1.1 / 8
    moved = on_a_device(digits, Placement(1, MACHINE, offload_frozen=True, offload_optimizers=True))
    assert (moved.held, moved.host) == (0, sum(row.total for row in digits.rows))
    assert set(moved.gradients.values()) == {0}
    narrow = on_a_device(digits, Placement(1, MACHINE, moments_8bit=("student", "fake score", "heads")))
    saved = on_a_device(digits, Placement(1)).held - narrow.held
    most = sum(row.trained for row in digits.rows) * (8 - 2 - 8 / 256)  # those of small parameters stay in float32
    assert 0.95 * most < saved < most
    stored = on_a_device(digits, Placement(1, MACHINE, frozen_precision="nf4"))
    assert whole.held - stored.held == pytest.approx(digits.storable["teacher"] * (4 - 0.5 - 4 / 64), abs=1)


@pytest.mark.thorough  # by day, tests/training/test_small_gpus.py
def test_offloading_the_frozen_weights_takes_adapters_along() -> None:
    """As `training.sharding.distribute` does; heads stay."""
    digits = counted_digits()
    denoiser = open_without_weights(load_config("digits")).denoiser
    with fake():
        adapters = measure(lora_copy(denoiser, 4))
    found = replace(digits, networks={**digits.networks, "student": adapters, "fake score": adapters})
    frozen = on_a_device(found, Placement(1, MACHINE, offload_frozen=True))
    assert [row.role for row in frozen.rows] == ["heads"]
    optimizers = on_a_device(found, Placement(1, MACHINE, offload_optimizers=True))
    assert [row.role for row in optimizers.rows] == ["teacher"]
    assert frozen.gathered > optimizers.gathered > 0  # the whole blocks, or the adapters in them


def test_traffic_is_what_the_formulas_say() -> None:
    digits = counted_digits()
    size = {row.role: row.gradients for row in digits.rows}

    def sent(gpus: int, parallel: str, role: str) -> tuple[float, float]:
        (found,) = (each for each in traffic(digits, Placement(gpus, MACHINE, parallel)) if each.role == role)
        return found.inside, found.between

    assert sent(4, "ddp", "student") == (pytest.approx(2 * 3 / 4 * size["student"]), 0)
    assert sent(4, "ddp", "teacher") == sent(1, "fsdp", "student") == (0, 0)
    assert sent(64, "ddp", "student") == (0, pytest.approx(2 * 63 / 64 * size["student"]))
    # The student runs once without a gradient for the critic, and once with one for itself: three gathers.
    assert sent(4, "fsdp", "student") == (pytest.approx(3 * share(digits, "student", 4) * 4 * size["student"]), 0)
    assert sent(64, "hybrid", "student") == (
        pytest.approx(7 * share(digits, "student", 8) * 4 * size["student"]),
        pytest.approx(2 * 7 / 8 * size["student"] * share(digits, "student", 8)),
    )
    assert sent(4, "fsdp", "heads")[0] > 3 / 4 * 2 * size["heads"]  # gathered at least once, and reduced


@pytest.mark.thorough
def test_samples_that_are_used_again_are_drawn_once() -> None:
    settings = ["critic_steps=3", "batch_size=32"]
    plain, reusing = (planned(load_config("digits", [*settings, *more])) for more in ([], ["reuse_samples=true"]))
    made = build(load_config("digits", settings), torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made.student(torch.randn(32, *made.image_shape), torch.arange(32) % 10)
    assert plain.flops - reusing.flops == pytest.approx(2 * counter.get_total_flops(), rel=5e-3)
    assert [update.times for update in reusing.found.updates.values()] == [1, 2, 1]

    def gathered(found: Footprint) -> float:
        return sum(found.gathers[name]["student"] * update.times for name, update in found.updates.items())

    assert gathered(plain.found) - gathered(reusing.found) == 2 * plain.found.gathers[CRITIC]["student"] > 0
    assert reusing.device.total == plain.device.total


@pytest.mark.thorough
def test_the_terms_of_few_steps_are_counted() -> None:
    """Levels are computed from values, of which a plan's tensors have none. Intra-segment guidance takes one
    evaluation of the teacher and one of the student without a gradient."""
    settings = ["critic_steps=1", "batch_size=8", "student.steps=2", "guidance_scale=2.0", "null_class=9"]
    plain, segment = (planned(load_config("digits", [*settings, *more])) for more in ([], ["segment.weight=0.5"]))
    made = build(load_config("digits", ["student.steps=1"]), torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made.student(torch.randn(8, *made.image_shape), torch.arange(8) % 10)
    one = counter.get_total_flops()
    assert segment.flops - plain.flops == pytest.approx(3 * one, rel=0.02)  # a guided teacher is evaluated twice


def test_guidance_as_a_term_of_its_own_is_planned() -> None:
    config = load_config("digits-decoupled-dmd")
    run = run_without_weights(config, open_without_weights(config))
    update: Any = run.stages[-1].student_update
    assert update.keywords["augmentation"].weight == config.augmentation.weight > 0


def test_seconds() -> None:
    digits = counted_digits()
    alone, many = Placement(1, MACHINE), Placement(64, MACHINE)
    operations = sum(update.flops * update.times for update in digits.updates.values())
    assert seconds(digits, alone, RATES).compute == pytest.approx(operations / 75e12)
    assert seconds(digits, alone, RATES).communication == 0
    measured = seconds(digits, many, replace(RATES, seconds=3.0), scale=0.5)
    assert measured.compute == 1.5
    assert measured.communication == pytest.approx(sum(each.between for each in traffic(digits, many)) / 50e9)
    assert measured.apart == measured.overlapped + measured.communication


@pytest.mark.thorough
def test_parts_and_more_gpus() -> None:
    """Parts of 8 need what a batch of 8 needs, beside the gradients; the table says it of a GPU among four."""
    parts, table = warm_up("generator.micro_batch=8"), tight().table
    update = parts.found.updates[STUDENT]
    assert (update.samples, update.parts) == (8, 4)
    assert parts.flops == pytest.approx(tight().flops, rel=1e-3)
    small = warm_up("batch_size=8").device.total
    gradients = max(parts.device.gradients.values())
    assert small < parts.device.total < small + 2 * gradients
    (among_four,) = (row for row in table if row.gpus == 4)
    assert among_four.device is not None
    assert among_four.device.total - among_four.device.gathered == pytest.approx(small, rel=0.05)
    assert [row.samples for row in table] == [32, 16, 8, 4, 2, 1, None, None, None, None]


@pytest.mark.thorough
def test_advice_holds() -> None:
    """Every setting that is said to make a run fit does, and the run as it is does not."""
    plan = tight()
    memory = plan.hardware.memory
    assert memory is not None
    assert plan.device.total > memory
    assert plan.remedies is not None
    names = {text.partition("=")[0] for remedy in plan.remedies for text in remedy.settings}
    assert names >= {"gradient_checkpointing", "generator.micro_batch", "offload_optimizers"}
    assert "It does not fit" in as_text(plan)
    for remedy in plan.remedies:
        assert " ".join(remedy.settings) in as_text(plan)
        total = warm_up(*remedy.settings).device.total
        assert total == pytest.approx(remedy.bytes, rel=0.03)
        assert total <= 1.03 * memory


def test_the_command(tmp_path: Path) -> None:
    arguments = ["plan", "digits-regression", "batch_size=32", "--gpus", "4"]
    done = CliRunner().invoke(app, [*arguments, "--memory", "1", "--output", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.exception or done.output
    assert "on 4 GPUs, parallel=ddp: 8 samples on each in an update" in done.output
    assert "It fits: " in done.output
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["per_gpu"]["total"] > facts["per_gpu"]["held"] > 0
    assert [row["gpus"] for row in facts["table"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [(3, 7), (300, 5, 3, 3)])
def test_weights_in_few_bits_are_as_large_as_real_ones(kind: Any, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    real = encode(weight, kind)
    with few_bits_by_size():
        counted = quantised_layers.encode(weight, kind)
    assert [(each.numel(), each.dtype) for each in counted] == [(each.numel(), each.dtype) for each in real]

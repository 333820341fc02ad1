"""The benchmark of updates: what it counts and measures, on a tiny teacher."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._C._autograd import DeviceType

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import bench_growth
import bench_saving
import bench_step
import gpu_cifar10
import study_settings
from bench_step import CRITIC, SAMPLES, STUDENT

from fdistill import load_teacher
from fdistill.base.errors import ArgumentError
from fdistill.config.reading import load_config
from fdistill.data.npz import open_npz
from fdistill.kernels import interpreted


@pytest.fixture
def bench(tiny_teacher: Path) -> bench_step.Bench:
    return bench_step.opened("digits", [f"teacher={tiny_teacher}", "batch_size=4", "device=cpu"])


@pytest.mark.thorough  # by day, its parts
def test_a_report_adds_up(bench: bench_step.Bench) -> None:
    times = {CRITIC: [0.1, 0.3, 0.2], STUDENT: [0.4]}
    found = bench_step.report(bench, times, peak=1e9, repeats=1, trace=None)
    json.dumps(found)
    assert found["iteration_seconds"] == pytest.approx(2 * 0.2 + 0.4)
    for name, update in found["updates"].items():
        phases = update["seconds_by_phase"]
        assert {"student, forward", "fake score, forward", "backward", "optimisers", "rest"} <= phases.keys(), name
        assert all(value >= 0 for value in phases.values()), name
        assert update["share_of_matrix_peak"] == pytest.approx(update["gflop"] / update["seconds"])
        assert update["peak_bytes"] > 10**8
        assert update["launches"] > 100
    assert "teacher, forward" in found["updates"][STUDENT]["seconds_by_phase"]


@pytest.mark.thorough
def test_reused_samples_are_timed_apart(tiny_teacher: Path) -> None:
    settings = [f"teacher={tiny_teacher}", "batch_size=4", "device=cpu", "critic_steps=3"]
    plain, reusing = (bench_step.opened("digits", [*settings, *more]) for more in ([], ["reuse_samples=true"]))
    times = {SAMPLES: [0.5], CRITIC: [0.2], STUDENT: [0.4]}
    found = bench_step.report(reusing, times, peak=1e9, repeats=1, trace=None)
    assert found["iteration_seconds"] == pytest.approx(0.5 + 3 * 0.2 + 0.4)
    flops = {name: update["gflop"] for name, update in found["updates"].items()}
    assert flops[SAMPLES] + flops[CRITIC] == pytest.approx(bench_step.counted(plain.critic) / 1e9)
    assert bench_step.gradient_difference(plain, reusing)[CRITIC] == 0  # the same samples, drawn before


def test_a_regression_term_has_the_teachers_samples(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path))
    settings = [f"teacher={tiny_teacher}", "batch_size=4", "device=cpu", "regression.pairs=8", "student_level=2.5"]
    alone = bench_step.opened("digits-regression", settings)
    assert list(alone.updates) == [STUDENT]
    found = bench_step.report(alone, {STUDENT: [0.1]}, peak=1e9, repeats=1, trace=None)
    plain = bench_step.opened("digits-vsd", [*settings, "fake_score.lora_rank=0"])
    both = bench_step.opened("digits-dmd", settings)
    assert list(both.updates) == [CRITIC, STUDENT]
    for bench in (plain, both):
        bench.critic()  # whose conditions the student's update takes
    more = bench_step.counted(both.student) - bench_step.counted(plain.student)
    assert more / 1e9 == pytest.approx(found["updates"][STUDENT]["gflop"])


def test_gradients_of_two_settings_are_compared_from_the_same_weights(tiny_teacher: Path) -> None:
    settings = [f"teacher={tiny_teacher}", "batch_size=4", "device=cpu"]
    plain, half = (bench_step.opened("digits", [*settings, f"precision={name}"]) for name in ("fp32", "bf16"))
    for _ in range(2):
        plain.critic()
        plain.student()
    assert bench_step.gradient_difference(plain, plain) == {CRITIC: 0, STUDENT: 0}
    weights = [value.clone() for value in plain.run.role("generator").state_dict().values()]
    found = bench_step.gradient_difference(plain, half)
    assert all(1e-4 < value < 0.5 for value in found.values()), found
    for mine, before in zip(half.run.role("generator").state_dict().values(), weights, strict=True):
        assert torch.equal(mine, before)


def test_a_gpu_is_busy_while_one_of_its_kernels_runs() -> None:
    def event(start: float, end: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> Any:
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(time_range=times, device_type=device, is_user_annotation=annotation)

    kernels = [event(50e3, 60e3), event(0, 10e3), event(5e3, 20e3), event(6e3, 7e3)]  # 0 to 20 ms and 50 to 60 ms
    others = [event(0, 100e3, DeviceType.CPU), event(0, 100e3, annotation=True)]
    assert bench_step.busy_seconds([*kernels, *others]) == pytest.approx(0.03)
    assert bench_step.busy_seconds(others) == 0


def test_a_plain_backend_is_named_beside_the_settings(tiny_teacher: Path) -> None:
    settings = [f"teacher={tiny_teacher}", "batch_size=4", "device=cpu"]
    plain = bench_step.opened("digits", [*settings, "backend=triton", "backend=reference"])
    plain.critic()
    if not interpreted():
        with pytest.raises(ArgumentError, match="'triton' needs CUDA"):
            bench_step.opened("digits", [*settings, "backend=triton"]).critic()


def test_operations_are_counted_forward_and_backward() -> None:
    a, b = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)

    def product() -> Tensor:
        return a @ b

    assert bench_step.counted(product) == 2 * 8 * 16 * 4
    assert bench_step.counted(lambda: product().sum().backward()) == 3 * 2 * 8 * 16 * 4


def test_updates_are_timed_with_checkpoints_and_without(bench: bench_step.Bench, tmp_path: Path) -> None:
    found = bench_saving.measure(bench, 2, tmp_path)
    assert found["checkpoint_bytes"] > 10_000
    assert found["seconds_until_written"] >= found["seconds_with"] > found["seconds_of_copy"] > 0


def test_growth_is_drawn(tmp_path: Path) -> None:
    points = {str(x): {"seconds": 0.1 * x, "peak_bytes": 1e8 * x} for x in (1, 2, 4)}
    bench_growth.draw({"config": "digits", "batches": points, "sizes": points}, tmp_path / "growth.png")
    assert Image.open(tmp_path / "growth.png").size > (900, 600)


def test_a_colour_teacher_is_made_of_an_archive_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, part in enumerate(("train", "test")):
        gpu_cifar10.made_up_jpeg(tmp_path / f"{part}.npz", 200, seed)
    monkeypatch.setattr(study_settings, "SAMPLES", 150)
    folder = tmp_path / "colour"
    study_settings.make_colour_teacher(folder, tmp_path / "train.npz", iterations=2)
    images = open_npz(folder / "train.npz").images
    large = Image.open(io.BytesIO(np.load(tmp_path / "train.npz")["jpeg"].tobytes()))  # the first of them
    first = np.asarray(large).reshape(8, 2, 8, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(images[0].numpy() - first).max() <= 0.5
    teacher = load_teacher(folder / "teacher")

    def sample(noise: Tensor, classes: Tensor) -> Tensor:
        return teacher(noise * 80, torch.full((len(noise),), 80.0), classes)

    def itself(noise: Tensor, classes: Tensor) -> Tensor:
        return images[: len(noise)] / 127.5 - 1

    distance, least = (study_settings.colour_distance(folder, each) for each in (sample, itself))
    assert 0 <= least < distance


def test_settings_are_compared_at_equal_arithmetic() -> None:
    teacher = study_settings.Teacher(["digits"], iterations=100, batch=64, rate=1e-4)
    for setting in study_settings.SETTINGS.values():
        given = dict(text.split("=", 1) for text in setting.overrides(teacher))
        samples = int(given["iterations"]) * int(given["batch_size"]) * (1 + int(given["critic_steps"]))
        assert samples == 100 * 64 * 3
        load_config(teacher.config[0], setting.overrides(teacher))

"""Scripts for a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("bench_kernels", SCRIPTS / "bench_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.thorough  # by day, tests/kernels compare the same kernels
@without_gpu
def test_without_a_gpu_the_benchmark_checks_and_exits_0(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(sys.executable, str(SCRIPTS / "bench_kernels.py"))
    assert done.returncode == 0, done.stderr
    assert "no CUDA GPU here: 14 operations agree with torch" in done.stdout


def test_the_benchmark_would_see_a_wrong_kernel(bench: ModuleType) -> None:
    cases = {case.name: case for case in bench.cases(torch.device("cpu"), small=True)}
    case = cases["matching"]
    wrong = bench.Case(case.name, case.size, case.make, lambda *a: [2 * v for v in case.fused(*a)], case.eager, 1.0)
    assert bench.compare(case) < 1e-2
    assert bench.compare(wrong) > 0.9


def test_rows_are_measured_compared_and_printed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a row on a GPU, with the three readings that need one given."""
    times = iter([0.1, 0.25, 0.05])
    monkeypatch.setattr(bench, "milliseconds", lambda function, sets: next(times))
    monkeypatch.setattr(bench, "launches", lambda function, arguments: 2)
    monkeypatch.setattr(bench, "extra_bytes", lambda function, arguments: 3_000_000)
    made = next(case for case in bench.cases(torch.device("cpu"), small=True) if case.name == "matching")
    case = bench.Case(made.name, made.size, made.make, made.fused, made.eager, 300e6)
    row: dict[str, Any] = bench.measure(case, copy=4000.0, cache=1000)
    assert row["gigabytes_per_second"] == pytest.approx(3000)
    assert row["share_of_copy"] == pytest.approx(0.75)
    assert [line.split(": ")[1] for line in bench.misses(row)] == [
        "75% of the copy bandwidth, wanted 85%",
        "2.50 times eager, wanted 3",
        "0.50 times torch.compile, wanted 1",
    ]
    cells = [cell.strip() for cell in bench.table([row]).splitlines()[-1].strip("|").split("|")]
    assert cells[2:] == ["300.0", "100.0", "3000", "75%", "2.5", "0.5", "2, 2, 2", "3, 3, 3"]
    assert json.loads(json.dumps(row)) == row

    def broken(function: Any, sets: Any) -> float:
        raise RuntimeError("no graph")

    monkeypatch.setattr(bench, "milliseconds", broken)
    row = bench.measure(case, copy=4000.0, cache=1000)
    assert bench.wrong(row) == [f"matching {case.size}: did not run (RuntimeError: no graph)"]
    assert bench.misses(row) == []
    assert "failed" in bench.table([row])


@without_gpu
def test_the_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run("env", f"PYTHON={sys.executable}", "bash", str(SCRIPTS / "gpu_check.sh"), str(tmp_path / "out"))
    assert done.returncode != 0
    assert "no CUDA GPU is visible" in done.stderr


@pytest.mark.parametrize("name", ["gpu_check", "gpu_scaling", "gpu_speed"])
def test_a_script_for_a_gpu_ends_within_ten_minutes(name: str) -> None:
    text = (SCRIPTS / f"{name}.sh").read_text(encoding="utf-8")
    limits = [int(seconds) for seconds in re.findall(r"^part \S+ (\d+) ", text, re.MULTILINE)]
    assert 0 < sum(limits) <= 570  # and half a minute to begin
    assert run("bash", "-n", str(SCRIPTS / f"{name}.sh")).returncode == 0


def test_the_script_of_cifar10_ends_at_its_limit(tmp_path: Path) -> None:
    settings = [f"PYTHON={sys.executable}", f"WORK={tmp_path / 'work'}", "LIMIT=1"]
    done = run("env", *settings, "bash", str(SCRIPTS / "gpu_cifar10.sh"), str(tmp_path / "out"), "--quick")
    assert done.returncode == 124
    assert "stopped after 1 s; the same command" in done.stderr
    text = (SCRIPTS / "gpu_cifar10.sh").read_text(encoding="utf-8")
    assert int(re.findall(r"LIMIT:-(\d+)", text)[0]) <= 600


@pytest.mark.thorough
def test_whole_iterations_run_with_either_backend(tmp_path: Path) -> None:
    settings = ["batch_size=8", "precision=fp32"]
    output = tmp_path / "step.json"
    done = run(sys.executable, str(SCRIPTS / "gpu_step.py"), "--iterations", "1", "--output", str(output), *settings)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["auto_milliseconds"] > 0
    assert report["reference_milliseconds"] > 0

"""How near `generate` comes to its network: what the benchmark counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import bench_generate


def found(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *arguments, "--device", "cpu", "--output", str(output)])
    bench_generate.main()
    return json.loads(output.read_text())


def test_the_first_batch_is_subtracted(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def took(checkpoint: str, arguments: Any, count: int) -> float:
        assert (checkpoint, arguments.steps) == (str(tiny_teacher), 2)
        return 5.0 + count / 8  # five seconds to start, and 8 images a second

    monkeypatch.setattr(bench_generate, "generate_seconds", took)
    monkeypatch.setattr(bench_generate, "forward_seconds", lambda *_: 0.125)
    options = [str(tiny_teacher), "--steps", "2", "--num-images", "12", "--batch-size", "4", "--repeats", "1"]
    result = found(monkeypatch, tmp_path / "found.json", *options)
    assert result["evaluations_per_image"] == 3
    assert result["images_per_second"] == pytest.approx({"network": 4 / (3 * 0.125), "generate": 8})
    assert result["share"] == pytest.approx(0.75)


def test_networks_and_images_are_timed(tiny_teacher: Path, tmp_path: Path) -> None:
    arguments: Any = SimpleNamespace(steps=1, batch_size=2, precision="bf16", compile=False, device="cpu")
    network, evaluations = bench_generate.evaluated(str(tiny_teacher), arguments, torch.device("cpu"))
    assert evaluations == 1
    assert 0 < bench_generate.forward_seconds(network, arguments, torch.device("cpu")) < 10
    assert 0 < bench_generate.generate_seconds(str(tiny_teacher), arguments, 2) < 60


def test_one_batch_alone_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        found(monkeypatch, tmp_path / "found.json", "digits", "--num-images", "4", "--batch-size", "4")
    assert "expected two or more times the batch size of 4" in capsys.readouterr().err

"""Every kernel compiled for real GPUs, without one: what an interpreter cannot find, and what decides its speed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.thorough import at_night

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    by_day = request.config.getoption("markexpr") == "not thorough"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [
        sys.executable,
        str(Path(__file__).parent.parent / "support" / "compile_kernels.py"),
        *([] if by_day else ["80"]),
        "90",
        "renoise",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


#: Kernels that walk samples or weights; the others read and write B numbers.
WALKING = {
    "denoising",
    "ema",
    "implicit",
    "implicit_backward",
    "matching",
    "renoise",
    "renoise_backward",
    "scale_rows",
    "to_x0",
}


@pytest.mark.parametrize(
    "capability", at_night([80, 90], lambda capability: capability == 80), ids=["ampere", "hopper"]
)
def test_every_kernel_compiles(compiled: list[dict[str, Any]], capability: int) -> None:
    folder = Path(__file__).parent.parent.parent / "fdistill" / "kernels" / "triton"
    jitted = set(re.findall(r"@triton\.jit\ndef _(\w+)", "".join(path.read_text() for path in folder.glob("*.py"))))
    inlined = {"address", "blend", "coefficients", "finish", "h", "normals", "samples"}
    assert {row["kernel"] for row in compiled if row["capability"] == capability} == jitted - inlined


def test_kernels_over_samples_do_not_spill_registers(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if row["kernel"] in WALKING:
            assert row["stack"] == 0, row
            # Two blocks fit a multiprocessor's 65,536 registers, so that one computes while the other waits.
            assert row["registers"] * 32 * row["num_warps"] <= 65536 // 2, row


def test_samples_are_read_and_written_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        transposes = row["constants"].get("CHANNELS", 1) > 1
        if row["kernel"] in WALKING and row["sample"] != "3x7x5" and not transposes:
            assert 16 in row["loads"], row
            # Four bfloat16, beside four float32, are 8 bytes.
            assert {8, 16} & set(row["stores"]) or row["kernel"] == "implicit", row


def test_noise_costs_fewer_instructions_than_memory_leaves_time_for(compiled: list[dict[str, Any]]) -> None:
    """An H200 issues about 30e12 instructions a second and moves 4.3e12 bytes: 70 an element of 10 bytes."""
    hopper = [row for row in compiled if row["capability"] == 90]
    seeded = [row for row in hopper if row["kernel"] == "renoise" and row["constants"]["SEEDED"]]
    plain = [row for row in seeded if row["constants"]["CHANNELS"] == 1 and row["sample"] != "3x7x5"]
    assert plain
    for row in plain:
        elements = row["constants"]["BLOCK"] * 4 / (32 * row["num_warps"])
        assert row["instructions"] / elements < 60, row

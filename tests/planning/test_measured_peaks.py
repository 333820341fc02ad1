"""What is counted without values is what real runs take: resident memory of a process at its peak, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fdistill.planning.placement import Placement, on_a_device
from support.planned import DIGITS
from support.planned import digits as counted_digits

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))
import measure_memory

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory as Linux counts it"),
    pytest.mark.thorough,  # by day, tests/planning/test_plan.py and tests/scripts/test_memory_table.py
]

#: Config -> settings with which activations are far more than what a process takes for other reasons.
CASES: dict[str, dict[str, Any]] = {
    "digits": DIGITS,
    "digits-regression": {"batch_size": 128, "images.workers": 1, "regression.pairs": 128},
    "digits-t2i": {"batch_size": 24, "critic_steps": 1, "images.workers": 1},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    """Bytes at the peaks of real runs, all in one process of their own."""
    return measure_memory.measured(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_within_15_per_cent_of_the_measured_peak(name: str, measured: dict[str, int]) -> None:
    if name == "digits":
        planned = on_a_device(counted_digits(), Placement(1)).total
    else:
        planned = measure_memory.counted({name: CASES[name]})[name]
    print(f"{name}: planned {planned / 1e6:.1f} MB, measured {measured[name] / 1e6:.1f} MB")
    assert measured[name] > 60e6
    assert planned == pytest.approx(measured[name], rel=0.15)

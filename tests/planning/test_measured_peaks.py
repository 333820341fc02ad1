"""What is counted without values is what real runs take: resident memory of a process at its peak, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fdistill.config.reading import load_config
from fdistill.planning.placement import footprint, on_a_device, placement_of
from fdistill.planning.weightless import open_without_weights, run_without_weights

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory as Linux counts it")

#: Config -> settings with which activations are far more than what a process takes for other reasons.
CASES: dict[str, dict[str, Any]] = {
    "digits": {"batch_size": 128, "critic_steps": 1, "images.workers": 1},
    "digits-regression": {"batch_size": 256, "images.workers": 1, "regression.pairs": 256},
    "digits-t2i": {"batch_size": 48, "critic_steps": 1, "images.workers": 1},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    """Bytes at the peaks of real runs, all in one process of their own."""
    paths = os.pathsep.join((str(Path(__file__).parent.parent), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "support.peaks", json.dumps(CASES)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_within_15_per_cent_of_the_measured_peak(name: str, measured: dict[str, int]) -> None:
    config = load_config(name, CASES[name])
    found = footprint(run_without_weights(config, open_without_weights(config)), 1)
    planned = on_a_device(found, placement_of(config, 1, 8)).total
    print(f"{name}: planned {planned / 1e6:.1f} MB, measured {measured[name] / 1e6:.1f} MB")
    assert measured[name] > 90e6
    assert planned == pytest.approx(measured[name], rel=0.15)

"""How long an iteration waits for a checkpoint that is written in the background; prints JSON.

    python scripts/bench_saving.py CONFIG [key=value ...] [--iterations 40]     # CONFIG as for bench_step.py

After a warm-up every second iteration is timed with a checkpoint: from before its tensors are copied to the end of the
iteration during which a thread writes them. The next one is timed without, when the checkpoint is written.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench_step import Bench, machine, opened, synchronize

from fdistill.training.checkpoint import save_checkpoint
from fdistill.training.saving import Saver

_WARM_UP = 4


def measure(bench: Bench, iterations: int, folder: Path) -> dict[str, Any]:
    """Median seconds of iterations without and with a checkpoint, of the copy alone, and of the whole writing."""
    run, saver = bench.run, Saver()
    plain: list[float] = []
    saved: list[float] = []
    copied: list[float] = []
    written: list[float] = []
    for number in range(_WARM_UP + iterations):
        with_checkpoint = number % 2 == 1
        synchronize(bench.device)
        began = time.perf_counter()
        if with_checkpoint:
            saver.save(run.state(), partial(save_checkpoint, folder, number, meta={}, keep=1))
            copied.append(time.perf_counter() - began)
        for _ in range(run.stage.critic_steps):
            bench.critic()
        bench.student()
        synchronize(bench.device)
        (saved if with_checkpoint else plain).append(time.perf_counter() - began)
        saver.wait()
        if with_checkpoint:
            written.append(time.perf_counter() - began)
    half = _WARM_UP // 2
    without, during = median(plain[half:]), median(saved[half:])
    return {
        "iterations": iterations,
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "seconds_without": without,
        "seconds_with": during,
        "stall": during / without - 1,
        "seconds_of_copy": median(copied[half:]),
        "seconds_until_written": median(written[half:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--iterations", type=int, default=40, help="timed ones, half of them with a checkpoint")
    arguments = parser.parse_args()
    bench = opened(arguments.config, arguments.overrides)
    with TemporaryDirectory() as folder:
        found = measure(bench, arguments.iterations, Path(folder))
    given = {"config": arguments.config, "overrides": arguments.overrides}
    print(json.dumps({**given, **machine(bench.device), **found}, indent=1))


if __name__ == "__main__":
    main()

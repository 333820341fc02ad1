"""Run whole updates of the digits distillation on a GPU in bfloat16 while any wait of the host for the GPU is an error,
and time an iteration with fused kernels beside one with the reference.

    python scripts/gpu_step.py [--output FILE.json] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_step import Bench, machine

from fdistill.base.files import atomic_file
from fdistill.config.reading import load_config


def iteration(bench: Bench) -> None:
    """As in training, apart from reading data and writing records."""
    for _ in range(bench.run.stage.critic_steps):
        bench.critic()
    bench.student()


def refusing_waits() -> AbstractContextManager[None]:
    class Refuse:
        def __enter__(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    return Refuse() if torch.cuda.is_available() else nullcontext()


def seconds(step: Any, device: torch.device, count: int) -> float:
    """Median of `count` iterations, each waited for."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--iterations", type=int, default=30)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config("digits", ["precision=bf16", *options.overrides])
    report: dict[str, Any] = machine(device)
    for backend in ("auto", "reference"):
        step = partial(iteration, Bench(config, device, backend))
        for _ in range(3):
            step()
        with refusing_waits():
            step()
        report[f"{backend}_milliseconds"] = 1e3 * seconds(step, device, options.iterations)
    print(json.dumps(report))
    print("an iteration waited for nothing" if device.type == "cuda" else "no CUDA GPU here: waits were not looked for")
    if options.output:
        with atomic_file(options.output) as temporary:
            temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

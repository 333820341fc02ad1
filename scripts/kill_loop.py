"""Kills runs at random moments, resumes each, and compares what they end with to a run that was never killed.

    python scripts/kill_loop.py --count 25

Of five kills two come at any moment, two while a checkpoint is saved, and one while the student is exported. A run that
ends before it is killed is compared, and the next one begins in a new folder. The runs are of an untrained teacher of
20,000 parameters on the CPU, in processes that are forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import time
from collections import Counter
from datetime import date
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from safetensors.torch import load_file

from fdistill import distill
from fdistill.base.files import is_leftover
from fdistill.base.state_dicts import tensors_sha256
from fdistill.training.checkpoint import checkpoints
from fdistill.training.journal import read_records

SAVED, EXPORTED = "while a checkpoint was saved", "while the student was exported"
AIMS = ("any", SAVED, "any", SAVED, EXPORTED)
LIMIT = 300.0  # seconds for one process


class Report(NamedTuple):
    """What happened: kills by the moment that their leftovers show, runs that were compared, and how those differ."""

    kills: Counter[str]
    runs: list[Path]
    differences: list[str]


def kill_loop(count: int, folder: Path, settings: dict[str, Any], *, seed: int = 0) -> Report:
    """Kills `count` processes and compares every run that they belong to with one of the same settings, left alone.

    Args:
        folder: an empty one, for the runs.
        settings: of `distill`, with the teacher.

    Raises:
        RuntimeError: a process that was not killed failed.
    """
    draw, report = random.Random(seed), Report(Counter(), [], [])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fdistill.training.loop", "diffusers", "tensorboard"])

    def started(output: Path) -> BaseProcess:
        given = {"output": output, "resume": True, **settings}
        process = context.Process(target=distill, args=("digits",), kwargs=given)
        process.start()
        return process

    straight, began = folder / "straight", time.perf_counter()
    _finished(started(straight))
    whole = time.perf_counter() - began
    output = folder / "killed-0"
    while sum(report.kills.values()) < count:
        aim = AIMS[sum(report.kills.values()) % len(AIMS)]
        process = started(output)
        _wait(process, output, aim, draw, whole)
        process.kill()
        process.join(LIMIT)
        if process.exitcode == -9:
            report.kills[_moment(output)] += 1
            continue
        _finished(process)
        _compare(straight, output, report)
        output = folder / f"killed-{len(report.runs)}"
    _finished(started(output))
    _compare(straight, output, report)
    return report


def _wait(process: BaseProcess, output: Path, aim: str, draw: random.Random, whole: float) -> None:
    """Returns at a moment to kill a process, or when it has ended; a whole run takes `whole` seconds."""
    if aim == "any":
        process.join(draw.uniform(0, whole))
        return
    place, start = (output / "checkpoints", ".") if aim == SAVED else (output, ".student")
    saves = draw.choice((1, 2)) if aim == SAVED else 1
    seen: set[str] = set()
    while len(seen) < saves and process.is_alive():
        seen |= _half_written(place, start)
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.005))


def _half_written(place: Path, start: str) -> set[str]:
    try:
        return {path.name for path in place.iterdir() if path.name.startswith(start) and is_leftover(path.name)}
    except FileNotFoundError:
        return set()


def _moment(output: Path) -> str:
    """When a run was killed, by what it left."""
    if _half_written(output / "checkpoints", "."):
        return SAVED
    if _half_written(output, ".student"):
        return EXPORTED
    return "between checkpoints" if checkpoints(output / "checkpoints") else "before the first checkpoint"


def _finished(process: BaseProcess) -> None:
    process.join(LIMIT)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"a run that was not killed ended with status {process.exitcode}; its message is above")


def _compare(straight: Path, output: Path, report: Report) -> None:
    """Adds to a report how a run differs from one that was never killed."""
    report.runs.append(output)
    for part in (f"checkpoints/{checkpoints(straight / 'checkpoints')[-1].name}", "student"):
        one, two = (_contents(path / part) for path in (straight, output))
        changed = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
        report.differences.extend(f"{output}: {part}/{name}" for name in changed)
    if _records(straight) != _records(output):
        report.differences.append(f"{output}: metrics.jsonl")
    report.differences.extend(f"{path}: left behind" for path in output.rglob(".*"))


def _contents(folder: Path) -> dict[str, str]:
    # Of the tensors: the order of what else is in a file is that of a hash table.
    return {
        path.relative_to(folder).as_posix(): tensors_sha256(dict(sorted(load_file(path).items())))
        for path in folder.rglob("*.safetensors")
    }


def _records(folder: Path) -> list[str]:
    measured = {"seconds", "images_per_second", "memory_gb"}
    records = read_records(folder / "metrics.jsonl")
    return [json.dumps({key: value for key, value in record.items() if key not in measured}) for record in records]


def save_teacher(folder: Path) -> None:
    """Saves an untrained teacher."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=10,
    )
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.75)
    ConsistencyModelPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)


def settings_of(teacher: Path, iterations: int) -> dict[str, Any]:
    """The settings of the runs."""
    return {
        "teacher": str(teacher),
        "device": "cpu",
        "batch_size": 4,
        "iterations": iterations,
        "log.every": 1,
        "log.checkpoint_every": 2,
        "log.samples_every": 0,
        "log.tracker": "none",
        "speed.share_cores": False,  # another number of threads changes results by rounding
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=25, help="number of kills")
    parser.add_argument("--iterations", type=int, default=30, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    began = time.perf_counter()
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher")
        settings = settings_of(folder / "teacher", options.iterations)
        report = kill_loop(options.count, folder, settings, seed=options.seed)
    moments = ", ".join(f"{count} {moment}" for moment, count in sorted(report.kills.items()))
    took = f"{time.perf_counter() - began:.0f} s"
    print(f"{sum(report.kills.values())} kills ({moments}) in {len(report.runs)} runs, {took}")
    print(f"{date.today()}, torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    print("\n".join(report.differences) or "every run ended bit-identical to one that was never killed")
    raise SystemExit(bool(report.differences))


if __name__ == "__main__":
    main()

"""How long an iteration waits for a checkpoint that is written in the background; prints JSON.

python scripts/bench_saving.py [CONFIG] [key=value ...] [--iterations 40]

After a warm-up every second iteration is timed with a checkpoint: from before its tensors are copied to the end of the
iteration during which a thread writes them. The next one is timed without, when the checkpoint is written.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fdistill.base.devices import start
from fdistill.config.reading import load_config
from fdistill.training.batches import Batches
from fdistill.training.build import build
from fdistill.training.checkpoint import save_checkpoint
from fdistill.training.inputs import training_data
from fdistill.training.journal import Journal
from fdistill.training.loop import iterate
from fdistill.training.optimise import Role
from fdistill.training.saving import Saver

_WARM_UP = 4


def measure(config_name: str, overrides: list[str], iterations: int, folder: Path) -> dict[str, Any]:
    """Median seconds of iterations without and with a checkpoint, of the copy alone, and of the whole writing."""
    config = load_config(config_name, overrides)
    _, device = start(config.device)
    run = build(config, device)
    data = training_data(run)
    roles = {name: Role(run.role(name), optimizer) for name, optimizer in run.optimizers.items()}
    journal = Journal(lambda t: run.ratio.bin_index(t), run.ratio.num_bins, config.max_skipped)
    generator, saver = torch.Generator(device), Saver()
    plain: list[float] = []
    saved: list[float] = []
    copied: list[float] = []
    written: list[float] = []
    with data.loader(config, run.networks.teacher, 0) as loader:
        batches = Batches(run, data, loader)
        for number in range(_WARM_UP + iterations):
            with_checkpoint = number % 2 == 1
            _synchronize(device)
            began = time.perf_counter()
            if with_checkpoint:
                saver.save(run.state(), partial(save_checkpoint, folder, number, meta={}, keep=1))
                copied.append(time.perf_counter() - began)
            iterate(run, batches, roles, generator, journal)
            _synchronize(device)
            (saved if with_checkpoint else plain).append(time.perf_counter() - began)
            saver.wait()
            if with_checkpoint:
                written.append(time.perf_counter() - began)
    half = _WARM_UP // 2
    without, during = median(plain[half:]), median(saved[half:])
    return {
        "config": config_name,
        "overrides": overrides,
        "iterations": iterations,
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "seconds_without": without,
        "seconds_with": during,
        "stall": during / without - 1,
        "seconds_of_copy": median(copied[half:]),
        "seconds_until_written": median(written[half:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--iterations", type=int, default=40, help="timed ones, half of them with a checkpoint")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = measure(arguments.config, arguments.overrides, arguments.iterations, Path(folder))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

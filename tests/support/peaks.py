"""Prints the bytes by which a real run's memory grows at its peak, on the CPU.

python -m support.peaks '{CONFIG: SETTINGS}', a process of its own, whose allocator gives freed memory back at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.training.batches import Batches
from fdistill.training.build import build
from fdistill.training.inputs import training_data
from fdistill.training.journal import Journal
from fdistill.training.loop import iterate
from fdistill.training.optimise import Role

_MMAP_THRESHOLD = -3


def train(config: DistillConfig) -> None:
    """An iteration of a real run."""
    run = build(config, torch.device("cpu"))
    data = training_data(run)
    roles = {name: Role(run.role(name), optimizer) for name, optimizer in run.optimizers.items()}
    journal = Journal(run.ratio.bin_index, run.ratio.num_bins)
    with data.loader(config, run.networks.teacher, 0) as loader:
        iterate(run, Batches(run, data, loader), roles, torch.Generator(), journal)


def resident(field: str) -> int:
    """Bytes now (VmRSS) or at the peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))


def growth(config: DistillConfig) -> int:
    """Of the second run, for which libraries are loaded and kernels are made."""
    train(config.model_copy(update={"batch_size": 8}))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now
    before = resident("VmRSS")
    train(config)
    return resident("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
    cases = json.loads(sys.argv[1])
    print(json.dumps({name: growth(load_config(name, settings)) for name, settings in cases.items()}))

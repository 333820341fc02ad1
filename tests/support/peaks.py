"""Prints the bytes by which a real run's memory grows at its peak, on the CPU.

python -m support.peaks '{CONFIG: SETTINGS}', a process of its own, whose allocator gives freed memory back at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fdistill import distill

_MMAP_THRESHOLD = -3
#: One iteration, and nothing beside training.
_ONCE = {"iterations": 1, "log.samples_every": 0, "log.checkpoint_every": 0, "log.tracker": "none"}


def resident(field: str) -> int:
    """Bytes now (VmRSS) or at the peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))


def growth(name: str, settings: dict[str, Any], folder: Path) -> int:
    """Of the second run, for which libraries are loaded and kernels are made."""
    distill(name, output=folder / "first", **{**settings, **_ONCE, "batch_size": 8})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now
    before = resident("VmRSS")
    distill(name, output=folder / "second", **settings, **_ONCE)
    return resident("VmHWM") - before


def main() -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
    found = {}
    for name, settings in json.loads(sys.argv[1]).items():
        with TemporaryDirectory() as folder:
            found[name] = growth(name, settings, Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Where a run is computed: versions and hardware, for environment.json in its folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fdistill import __version__
from fdistill.base import rng
from fdistill.base.files import atomic_file

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

RECORD = "environment.json"
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device's name, and the number of processes, threads and CPU cores, as JSON values."""
    cuda = device.type == "cuda"
    return {
        "fdistill": __version__,
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
        **({"cuda": torch.version.cuda} if cuda else {}),
        "system": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        "processes": rng.world()[1],
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def note_environment(folder: Path, device: torch.device) -> None:
    """Writes environment.json; of a resumed run that of the last process."""
    with atomic_file(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(environment(device), indent=1) + "\n", encoding="utf-8")


def peak_memory(device: torch.device) -> float | None:
    """GB that were in use at most, of a GPU by torch, otherwise by the process; None on Windows, which does not say it.
    Waits for nothing.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Memory of real runs on the CPU beside what `fdistill plan` counts for them, as Markdown.

python scripts/measure_memory.py [--processes N] [--channels C] '{"CONFIG": {"KEY": VALUE, ...}, ...}'

Each config runs twice: once so that libraries are loaded and kernels are made, and once to be measured, by what the
resident memory of the first process grows to at the peak of two iterations. Several processes are started by torchrun
and talk over gloo. A config can be named more than once: as digits#1, digits#2.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DModel

from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.files import read_json_object
from fdistill.config.reading import load_config
from fdistill.planning.placement import footprint, on_a_device, placement_of
from fdistill.planning.weightless import open_without_weights, run_without_weights
from fdistill.training.batches import Batches
from fdistill.training.build import build
from fdistill.training.inputs import training_data
from fdistill.training.journal import Journal
from fdistill.training.loop import iterate
from fdistill.training.optimise import Role

_MMAP_THRESHOLD = -3
_MACHINE = 8
Cases = Mapping[str, Mapping[str, Any]]


def counted(cases: Cases, processes: int = 1) -> dict[str, int]:
    """Bytes of one process at its peak, as they are planned."""
    found = {}
    for name, settings in cases.items():
        config = load_config(name.partition("#")[0], dict(settings))
        run = run_without_weights(config, open_without_weights(config))
        found[name] = on_a_device(footprint(run, processes), placement_of(config, processes, _MACHINE)).total
    return found


def measured(cases: Cases, processes: int = 1) -> dict[str, int]:
    """Bytes of the first process at its peak, in processes of their own.

    Raises:
        ValueError: with what they said, if they fail.
    """
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), __file__, "--measure", json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ValueError(done.stderr[-3000:])
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(cases: Cases) -> None:
    """Prints as JSON by how many bytes each of the runs grows, in this process."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)  # so that freed memory is given back at once
    found = {}
    for name, settings in cases.items():
        _iterate(name, {**settings, "batch_size": 8}, 1)
        _forget_peak()
        before = _resident("VmRSS")
        _iterate(name, settings, 2)  # in the second, optimisers have moments
        found[name] = _resident("VmHWM") - before
    if rng.world()[0] == 0:
        print(json.dumps(found))


def _iterate(name: str, settings: Mapping[str, Any], count: int) -> None:
    """Builds a run and takes its first iterations, as `distill` does; saves nothing. The peak is that of iterations."""
    config = load_config(name.partition("#")[0], dict(settings))
    _, device = start(config.device)
    run = build(config, device)
    data = training_data(run)
    roles = {role: Role(run.role(role), optimizer) for role, optimizer in run.optimizers.items()}
    journal = Journal(run.ratio.bin_index, run.ratio.num_bins, config.max_skipped)
    with data.loader(config, run.networks.teacher, 0) as loader:
        batches = Batches(run, data, loader)
        _forget_peak()
        for _ in range(count):
            iterate(run, batches, roles, torch.Generator(device), journal)


def _forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now


def _resident(field: str) -> int:
    """Bytes now (VmRSS) or at the peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))


def _wide_teacher(folder: Path, channels: int) -> Path:
    """The digits' teacher with more channels and random weights."""
    source = EMBEDDED_TEACHERS["digits"]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = read_json_object(source / "unet" / "config.json")
    network: Any = UNet2DModel.from_config({**config, "block_out_channels": [channels, 2 * channels]})
    network.save_pretrained(folder / "unet")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=json.loads, help="config -> settings, as JSON")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--channels", type=int, help="give the digits' teacher so many; it has 32")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        _measure(options.cases)
        return
    with TemporaryDirectory() as folder:
        cases = options.cases
        if options.channels is not None:
            teacher = str(_wide_teacher(Path(folder) / "teacher", options.channels))
            cases = {name: {"teacher": teacher, **settings} for name, settings in cases.items()}
        planned, found = counted(cases, options.processes), measured(cases, options.processes)
    print("| config | counted, MB | measured, MB | counted against measured |\n|---|---|---|---|")
    for name, size in found.items():
        ratio = 100 * (planned[name] / size - 1)
        print(f"| {name} | {planned[name] / 1e6:.0f} | {size / 1e6:.0f} | {ratio:+.1f} % |")


if __name__ == "__main__":
    main()

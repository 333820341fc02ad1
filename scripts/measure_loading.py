"""What a process takes of a machine's memory while a run is built, beside the files that processes share; prints MiB.

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 scripts/measure_loading.py TEACHER [key=value ...]

TEACHER is a folder, which is made if it does not exist: an untrained UNet of 971 MiB in float32, its files in fp16.
"""

from __future__ import annotations

import gc
import re
import sys
import threading
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.distributed import from_main_process
from fdistill.config.reading import load_config
from fdistill.training.build import build
from fdistill.training.loop import open_watch  # noqa: F401 (with all that a run imports)


def make_teacher(folder: Path) -> None:
    """Writes the pipeline."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        num_class_embeds=10,
        block_out_channels=(512, 1024),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet.half(), DDPMScheduler()).save_pretrained(folder)


def anonymous() -> float:
    """MiB of this process's memory that are no file's."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    teacher, *settings = sys.argv[1:]
    _, device = start("cpu")
    from_main_process(lambda: None if Path(teacher).is_dir() else make_teacher(Path(teacher)))
    config = load_config("digits", ["method=diff-instruct", "data=teacher-samples", f"teacher={teacher}", *settings])
    gc.collect()
    before, peak, built = anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not built.wait(0.01):
            peak = max(peak, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    run = build(config, device)
    built.set()
    watching.join()
    if rng.world()[0] == 0:
        print(f"{' '.join(settings)}: {peak - before:,.0f} MiB at most, for {len(run.optimizers)} trained roles")


if __name__ == "__main__":
    main()

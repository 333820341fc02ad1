"""Images/s of the loader for a folder of PNG files, made on the fly; prints JSON.

python scripts/bench_data.py [--sizes 8,32] [--workers 1,2] [--images 10000] [--seconds 5]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fdistill.data import Batching, ImageLoader, open_source

_BATCH = 256


def make_folder(folder: Path, count: int, size: int) -> None:
    """RGB noise over a gradient, in ten classes: about as large in bytes as photographs of that size."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 200, size)[None, :, None]
    for number in range(count):
        path = folder / f"{number % 10}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((ramp + generator.integers(0, 40, (size, size, 3))).astype(np.uint8)).save(path)


def images_per_second(folder: Path, size: int, workers: int, seconds: float) -> float:
    """After a warm-up of as many batches as the workers keep ready."""
    with ImageLoader(open_source(str(folder)), (3, size, size), Batching(_BATCH, seed=0), workers=workers) as loader:
        for _ in range(5 * workers):
            next(loader)
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            count += len(next(loader).rows)
        return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8,32")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    results = []
    for size in map(int, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder), arguments.images, size)
            for workers in map(int, arguments.workers.split(",")):
                speed = images_per_second(Path(folder), size, workers, arguments.seconds)
                results.append({"png": f"{size}x{size}", "workers": workers, "images_per_second": round(speed)})
    print(json.dumps({"batch_size": _BATCH, "results": results}, indent=1))


if __name__ == "__main__":
    main()

"""How time and memory of an iteration grow with batch size and resolution; writes a log-log figure and its numbers.

    python scripts/bench_growth.py OUTPUT_DIR [--config digits] [--batches 1,2,...,1024] [--sizes 8,16,32,64]

Batches are of CONFIG, as for bench_step.py. Sizes are of EDM's network of width 32 with batch 4. Each point has a
process of its own: an iteration to warm up, the median of three, and the memory of that process at its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench_step import machine, memory_peak, opened, seconds

from fdistill.base.files import atomic_file

_REPEATS = 3


def point(config: str, overrides: list[str]) -> dict[str, Any]:
    """Seconds of an iteration and bytes at its peak."""
    bench = opened(config, overrides)

    def iteration() -> None:
        for _ in range(bench.run.stage.critic_steps):
            bench.critic()
        bench.student()

    iteration()
    times = [seconds(iteration, bench.device) for _ in range(_REPEATS)]
    return {"seconds": median(times), "peak_bytes": memory_peak(iteration, bench.device), **machine(bench.device)}


def measured(config: str, *overrides: str) -> dict[str, Any] | None:
    """`point` in a process of its own; None where memory does not suffice."""
    command = [sys.executable, __file__, "--point", config, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{config} {' '.join(overrides)}: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{config} {' '.join(overrides)}: {found['seconds']:.3f} s, {found['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """The figure: seconds above, memory below; batches at the left, sizes at the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    columns = [("batches", f"samples in a batch ({found['config']})"), ("sizes", "height and width (EDM, width 32)")]
    for column, (key, label) in enumerate(columns):
        points = {int(x): each for x, each in found[key].items()}
        for row, (value, unit, scale) in enumerate([("seconds", "s an iteration", 1.0), ("peak_bytes", "GB", 1e-9)]):
            axis = axes[row][column]
            xs = sorted(points)
            ys = [points[x][value] * scale for x in xs]
            axis.loglog(xs, ys, "o-")
            power = 1 if key == "batches" else 2
            axis.loglog(xs, [ys[-1] * (x / xs[-1]) ** power for x in xs], "--", color="grey")
            axis.set_ylabel(unit)
            axis.set_ylim(0.7 * min(ys), 1.4 * max(ys))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.set_xticks(xs, [str(x) for x in xs], minor=False, fontsize=8)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
        axes[1][column].set_xlabel(label)
        axes[0][column].set_title(
            "dashed: in proportion to " + ("samples" if key == "batches" else "pixels"), fontsize=9
        )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(point(sys.argv[2], sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", default="digits")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256,512,1024")
    parser.add_argument("--sizes", default="8,16,32,64")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    batches = {size: measured(arguments.config, f"batch_size={size}") for size in arguments.batches.split(",")}
    sizes = {
        size: measured(
            "edm-w32", "batch_size=4", f"teacher=bench_teachers:edm_32_at_{size}", "discriminator.features=[mid]"
        )
        for size in arguments.sizes.split(",")
    }
    found = {
        "config": arguments.config,
        "batches": {key: value for key, value in batches.items() if value},
        "sizes": {key: value for key, value in sizes.items() if value},
    }
    with atomic_file(arguments.output / "growth.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, arguments.output / "growth.png")


if __name__ == "__main__":
    main()

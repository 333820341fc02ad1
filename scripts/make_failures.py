"""Small runs of the digits that go wrong on purpose: a picture of each, and the alarms that its records raise.

python scripts/make_failures.py OUTPUT_DIR [--only rate,gan] [--runs RUNS_DIR]

OUTPUT_DIR gets NAME.png, with the samples of a healthy run of the same preset on the left and the failing run's on the
right, of the same noise, unless the run ended before it had a grid; curves.png of the healthy run; and failures.json
with the settings, the alarms and how the samples look. A run that is in RUNS_DIR already is not repeated.
docs/failures.md shows what comes out.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fdistill.base.files import atomic_file
from fdistill.base.images import save_side_by_side
from fdistill.training.appearance import LOOK
from fdistill.training.journal import read_records

ITERATIONS = 60
#: Preset -> its run without changes. `_OF_PROMPTS` are runs of digits-t2i, whose teacher can be guided.
HEALTHY = {"digits": "healthy", "digits-t2i": "healthy-prompts"}
_OF_PROMPTS = ("healthy-prompts", "guidance")
#: What each run changes of its preset.
RUNS: dict[str, list[str]] = {
    "healthy": [],
    "healthy-prompts": [],
    "guidance": ["guidance_scale=60"],
    "rate": ["generator.lr=2e-2"],
    "lazy-critic": ["fake_score.lr=1e-7"],
    "critic-rate": ["fake_score.lr=3e-2"],
    "gan": [
        "generator.gan_gradient_ratio=0",
        "generator.gan_weight=1000",
        "discriminator.gan_weight=1",
        "discriminator.lr=1e-2",
        "discriminator.features=[down0,down1,mid]",
    ],
    "slow-critic": ["generator.lr=4e-3", "fake_score.lr=2e-5", "critic_steps=1"],
    "explosion": ["generator.lr=10"],
    "weighting": ["generator.weighting=uniform"],
}
#: Of a grid in samples/: its rows, and how many of them are shown.
_ROWS, _SHOWN = 8, 4


def preset(name: str) -> str:
    """The preset of a run."""
    return "digits-t2i" if name in _OF_PROMPTS else "digits"


def distil(folder: Path, name: str) -> tuple[str, float]:
    """Runs `fdistill distill`; the error that ended it, if any, and its seconds of a processor."""
    settings = [f"iterations={ITERATIONS}", "log.every=5", "log.samples_every=15", "log.checkpoint_every=0"]
    command = [sys.executable, "-m", "fdistill", "distill", preset(name), *settings, "log.tracker=none", *RUNS[name]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (lines[-1] if done.returncode and lines else ""), seconds


def newest_grid(folder: Path) -> Path:
    """The last sample grid that a run has saved."""
    return max((folder / "samples").glob("0*.png"))


def shown(grid: Path, made: Path) -> Path:
    """The first rows of a sample grid."""
    picture = Image.open(grid)
    picture.crop((0, 0, picture.width, picture.height * _SHOWN // _ROWS)).save(made)
    return made


def facts(folder: Path) -> dict[str, Any]:
    """What a run's records say: the alarms with the iterations in which they were raised, and its last samples' look
    divided by the teacher's.
    """
    records = read_records(folder / "metrics.jsonl")
    raised: dict[str, list[int]] = {}
    for record in records:
        for name in record.get("alarms", ()):
            raised.setdefault(name, []).append(record["iteration"])
    looks = [record for record in records if f"{LOOK}contrast" in record]
    names = ("brightness", "contrast", "diversity")
    look = {name: round(looks[-1][LOOK + name] / looks[-1][f"{LOOK}teacher_{name}"], 3) for name in names if looks}
    skipped = sum(record.get(f"{role}/skipped", 0) for record in records for role in ("generator", "fake_score"))
    reached = records[-1]["iteration"] if records else 0
    return {"recorded": reached, "alarms": raised, "beside_teacher": look, "skipped": skipped}


def make(output: Path, runs: Path, names: list[str]) -> dict[str, Any]:
    """Runs what is missing, and writes a picture of each run that fails."""
    made: dict[str, Any] = {}
    healthy = {HEALTHY[preset(name)] for name in names} | {HEALTHY["digits"]}
    for name in [*sorted(healthy), *(name for name in names if name not in healthy)]:
        folder, note = runs / name, runs / f"{name}.json"
        if not note.is_file():
            error, seconds = distil(folder, name)
            note.write_text(
                json.dumps({"error": error.replace(str(folder), "RUN"), "processor_seconds": round(seconds)}),
                encoding="utf-8",
            )
        made[name] = {"settings": RUNS[name], **facts(folder), **json.loads(note.read_text(encoding="utf-8"))}
        grid = newest_grid(folder)
        if name not in healthy and int(grid.stem) > 0:
            panels = [
                (f"{who}, iteration {int(found.stem)}", shown(found, runs / f"{who}.png"))
                for who, found in (("healthy", newest_grid(runs / HEALTHY[preset(name)])), (name, grid))
            ]
            save_side_by_side(panels, output / f"{name}.png")
        print(f"{name}: {made[name]}", flush=True)
    # With fewer colours, which a picture of lines does not miss, it is a third as large.
    curves = Image.open(runs / HEALTHY["digits"] / "curves.png").convert("RGB").quantize(48)
    curves.save(output / "curves.png", optimize=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", help="names of runs, as in rate,gan")
    parser.add_argument("--runs", type=Path, help="where the runs are kept; a temporary folder by default")
    arguments = parser.parse_args()
    names = list(RUNS) if arguments.only is None else arguments.only.split(",")
    if unknown := set(names) - RUNS.keys():
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        runs.mkdir(parents=True, exist_ok=True)
        found = make(arguments.output, runs, names)
    where = {
        "command": f"python scripts/make_failures.py {arguments.output}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "iterations": ITERATIONS,
    }
    with atomic_file(arguments.output / "failures.json") as temporary_file:
        temporary_file.write_text(json.dumps({**where, "runs": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""How fast students of several small teachers converge under different settings, at equal arithmetic.

    python scripts/study_settings.py OUTPUT_DIR [--only edm/] [--seeds 0,1,2] [--jobs 2] [--minutes 6]

A row is TEACHER/SETTINGS. Teachers differ in family, data and start: the embedded digits; an EDM network (DDPM++ with
four blocks a level, sigma_data 0.75) that is trained here on the same digits in --minutes, started at sigma 2.5 and at
80; and the embedded text-to-image teacher. Every run scores itself five times on the way. What is made already is kept.
The table has the Frechet distance after 40, 60, 80 and 100 % of the iterations, as multiples of the teacher's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import train_edm_teacher

from evaluation.evaluate import evaluate
from fdistill.adapters.edm import EDMDenoiser
from fdistill.base.files import replaced_folder
from fdistill.data.digits import load_digits
from fdistill.networks import EDMNetwork
from fdistill.training.journal import read_records

QUIET = ["log.samples_every=0", "log.tracker=none"]


@dataclass(frozen=True)
class Teacher:
    """A config with its settings, and what `Setting` multiplies."""

    config: list[str]
    iterations: int
    batch: int = 128
    rate: float = 2e-4


@dataclass(frozen=True)
class Setting:
    """What a row changes; with a smaller batch, or fewer critic updates, a run has more iterations."""

    rate: float = 1.0
    batch: float = 1.0
    decay: float = 0.98
    schedule: str = "constant"
    critic_steps: int = 2

    def overrides(self, teacher: Teacher) -> list[str]:
        """For `fdistill distill`."""
        return [
            f"generator.lr={self.rate * teacher.rate}",
            f"fake_score.lr={self.rate * teacher.rate}",
            f"generator.lr_schedule={self.schedule}",
            f"batch_size={round(self.batch * teacher.batch)}",
            f"ema.decays=[{self.decay}]",
            f"ema.export={self.decay}",
            f"critic_steps={self.critic_steps}",
            f"iterations={self.iterations(teacher)}",
        ]

    def iterations(self, teacher: Teacher) -> int:
        """How many take the arithmetic of the teacher's number with all of its batch and two critic updates."""
        return round(teacher.iterations / self.batch * 3 / (1 + self.critic_steps))


_EDM = ["digits", "teacher=EDM"]
TEACHERS = {
    "digits": Teacher(["digits"], 250),
    "edm": Teacher(_EDM, 490),
    "edm-80": Teacher([*_EDM, "student_level=80", "matching_levels.high=0.98", "critic_levels.high=1.0"], 490),
    "t2i": Teacher(["digits-t2i", "eval.protocol=digits-t2i"], 250, batch=64, rate=1e-4),
}
SETTINGS = {
    "before": Setting(),
    "short average": Setting(decay=0.95),
    "rate x 2": Setting(rate=2),
    "short average + rate x 2 + cosine": Setting(2, decay=0.95, schedule="cosine"),
    "short average + rate x 4 + cosine": Setting(4, decay=0.95, schedule="cosine"),
    "one critic update": Setting(critic_steps=1),
    "half the batch": Setting(batch=0.5),
    "half the batch + short average + rate x 2 + cosine": Setting(2, 0.5, 0.95, "cosine"),
}


def make_edm_teacher(folder: Path, minutes: float) -> None:
    """An EDM network of the digits, with two threads."""
    torch.set_num_threads(2)
    torch.manual_seed(train_edm_teacher.SEED)
    network: Any = EDMNetwork(
        model_type="SongUNet",
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=24,
        channel_mult=[1, 2],
        num_blocks=4,
        attn_resolutions=[8],
        dropout=0.0,
        sigma_data=0.75,
    )
    images, labels = load_digits()
    facts = train_edm_teacher.train(EDMDenoiser(network), images, labels, seconds=60 * minutes, batch_size=64)
    with replaced_folder(folder) as temporary:
        network.save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    torch.set_num_threads(1)


def distil(output: Path, row: str, seed: int) -> Path:
    """One run; its folder."""
    name, _, setting_name = row.partition("/")
    teacher, setting = TEACHERS[name], SETTINGS[setting_name]
    folder = output / f"{row.replace('/', '--').replace(' ', '-')}-{seed}"
    if (folder / "student").is_dir():
        return folder
    command = [sys.executable, "-m", "fdistill", "distill", *teacher.config, *setting.overrides(teacher), *QUIET]
    command += [f"eval.every={-(-setting.iterations(teacher) // 5)}", "eval.metrics=[fd_digits]", f"seed={seed}"]
    command = [part.replace("EDM", str(output / "edm-teacher")) for part in command]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", str(folder)], check=True, capture_output=True, text=True, env=one_thread)
    print(f"done: {folder.name}", flush=True)
    return folder


def curve(folder: Path) -> list[float]:
    """The scores of a run, in their order."""
    records = read_records(folder / "metrics.jsonl")
    return [value for record in records for name, value in record.items() if name.endswith("fd_digits")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", help="rows whose name contains one of these, as in edm/,64")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=6.0)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    rows = [f"{teacher}/{settings}" for settings in SETTINGS for teacher in TEACHERS]
    rows = [row for row in rows if not arguments.only or any(part in row for part in arguments.only.split(","))]
    if any(row.startswith("edm") for row in rows) and not (output / "edm-teacher").is_dir():
        make_edm_teacher(output / "edm-teacher", arguments.minutes)
    jobs = [(row, seed) for seed in seeds for row in rows]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = dict(zip(jobs, pool.map(lambda job: distil(output, *job), jobs), strict=True))
    own: dict[str, dict[str, Any]] = {
        "digits": {"samples": "digits"},
        "t2i": {"samples": "digits-t2i", "protocol": "digits-t2i", "guidance_scale": 2.0},
    }
    scores: dict[str, float] = {}
    for teacher in dict.fromkeys(row.partition("/")[0] for row in rows):
        options = own.get(teacher, {"samples": str(output / "edm-teacher")})
        scores[teacher] = evaluate(**options, metrics=["fd_digits"])["metrics"]["fd_digits"]
    curves = {row: [curve(folders[row, seed]) for seed in seeds] for row in rows}
    found = {"teachers": scores, "seeds": seeds, "curves": curves}
    (output / "settings.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| | teacher | 40 % | 60 % | 80 % | 100 % |\n|---|---|---|---|---|---|")
    for row in sorted(rows):
        own_score = scores[row.partition("/")[0]]
        cells = []
        for place in (-4, -3, -2, -1):
            values = [each[place] / own_score for each in curves[row]]
            cells.append(f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else ""))
        print(f"| {row} | {own_score:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

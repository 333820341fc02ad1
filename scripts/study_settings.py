"""How fast students of several small teachers converge under different settings, at equal arithmetic.

    python scripts/study_settings.py OUTPUT_DIR [--only edm/] [--seeds 0,1,2] [--jobs 2] [--cifar10 TRAIN.npz]

A row is TEACHER/SETTINGS. Teachers differ in family, size, data and start: the embedded digits; an EDM network (DDPM++
with four blocks a level, sigma_data 0.75) that is trained here on the same digits, started at sigma 2.5 and at 80; the
embedded text-to-image teacher; and, with --cifar10, an EDM network of CIFAR-10 at 16 x 16. Digits are scored five times
on the way, colour images at the end. What is made already is kept. The table has the Frechet distance after 40, 60, 80
and 100 % of the iterations, as multiples of the teacher's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gpu_cifar10
import numpy as np
import torch
import train_edm_teacher
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import fdistill
from evaluation.evaluate import evaluate
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.moments import Moments
from fdistill.adapters.edm import EDMDenoiser
from fdistill.base.files import replaced_folder
from fdistill.data.digits import load_digits
from fdistill.data.npz import open_npz
from fdistill.networks import EDMNetwork
from fdistill.sampler import heun_sample
from fdistill.training.journal import read_records

QUIET = ["log.samples_every=0", "log.tracker=none"]
SAMPLES = 5000  # of colour images
_FEATURES = replace(gpu_cifar10.QUICK, feature_width=32, feature_epochs=4)


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
    gan_ratio: float = 0.0
    critic_steps: int = 2

    def overrides(self, teacher: Teacher) -> list[str]:
        """For `fdistill distill`."""
        return [
            f"generator.lr={self.rate * teacher.rate}",
            f"fake_score.lr={self.rate * teacher.rate}",
            f"generator.lr_schedule={self.schedule}",
            f"generator.gan_gradient_ratio={self.gan_ratio}",
            f"batch_size={round(self.batch * teacher.batch)}",
            f"ema.decays=[{self.decay}]",
            f"ema.export={self.decay}",
            f"critic_steps={self.critic_steps}",
            f"iterations={self.iterations(teacher)}",
        ]

    def iterations(self, teacher: Teacher) -> int:
        """How many take the arithmetic of the teacher's number with all of its batch and two critic updates."""
        return round(teacher.iterations / self.batch * 3 / (1 + self.critic_steps))


_EDM = ["digits", "teacher=OUT/edm-teacher"]
_WIDE = ["matching_levels.high=0.98", "critic_levels.high=1.0"]
TEACHERS = {
    "digits": Teacher(["digits"], 250),
    "edm": Teacher(_EDM, 490),
    "edm-80": Teacher([*_EDM, "student_level=80", *_WIDE], 490),
    "t2i": Teacher(["digits-t2i", "eval.protocol=digits-t2i"], 250, batch=64, rate=1e-4),
    "colour": Teacher(
        ["digits", "teacher=OUT/colour/teacher", "data=OUT/colour/train.npz", "matching_levels.high=0.8"], 300, batch=64
    ),
}
SETTINGS = {
    "before": Setting(),
    "short average": Setting(decay=0.95),
    "rate x 2": Setting(rate=2),
    "short average + rate x 2 + cosine": Setting(2, decay=0.95, schedule="cosine"),
    "short average + rate x 4 + cosine": Setting(4, decay=0.95, schedule="cosine"),
    "short average + rate x 2 + cosine + GAN 0.3": Setting(2, decay=0.95, schedule="cosine", gan_ratio=0.3),
    "one critic update": Setting(critic_steps=1),
    "half the batch": Setting(batch=0.5),
    "half the batch + short average + rate x 2 + cosine": Setting(2, 0.5, 0.95, "cosine"),
}


def make_edm_teacher(folder: Path) -> None:
    """An EDM network of the digits: a quarter of an hour on one core."""
    images, labels = load_digits()
    _train_teacher(folder, images, labels, num_blocks=4, sigma_data=0.75, iterations=4000)


def make_colour_teacher(folder: Path, archive: Path, iterations: int = 2000) -> None:
    """An EDM network of CIFAR-10 at 16 x 16, and beside it the images and a classifier whose features give the distance
    to them: a quarter of an hour on one core.
    """
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        gpu_cifar10.unpack_jpeg(archive.with_name(archive.name.replace("train", part)), folder / "large.npz")
        large = open_npz(folder / "large.npz")
        images = F.avg_pool2d(large.images.float(), 2).round().to(torch.uint8)
        np.savez(folder / f"{part}.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=large.labels.numpy())
    (folder / "large.npz").unlink()
    gpu_cifar10.train_features(folder, _FEATURES, torch.device("cpu"))
    data = open_npz(folder / "train.npz")
    _train_teacher(folder / "teacher", data.images, data.labels, num_blocks=2, sigma_data=0.5, iterations=iterations)


def _train_teacher(
    folder: Path, images: Tensor, labels: Tensor, *, num_blocks: int, sigma_data: float, iterations: int
) -> None:
    torch.manual_seed(train_edm_teacher.SEED)
    network: Any = EDMNetwork(
        model_type="SongUNet",
        img_resolution=images.shape[-1],
        img_channels=images.shape[1],
        label_dim=10,
        model_channels=24,
        channel_mult=[1, 2],
        num_blocks=num_blocks,
        attn_resolutions=[8],
        dropout=0.0,
        sigma_data=sigma_data,
    )
    facts = train_edm_teacher.train(EDMDenoiser(network), images, labels, iterations=iterations, batch_size=64)
    with replaced_folder(folder) as temporary:
        network.save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def distil(output: Path, row: str, seed: int) -> Path:
    """One run; its folder."""
    name, _, setting_name = row.partition("/")
    teacher, setting = TEACHERS[name], SETTINGS[setting_name]
    folder = output / f"{row.replace('/', '--').replace(' ', '-')}-{seed}"
    if (folder / "student").is_dir():
        return folder
    command = [sys.executable, "-m", "fdistill", "distill", *teacher.config, *setting.overrides(teacher), *QUIET]
    command = [part.replace("OUT", str(output)) for part in command]
    if name != "colour":
        command += [f"eval.every={-(-setting.iterations(teacher) // 5)}", "eval.metrics=[fd_digits]"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [f"seed={seed}", "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread)
    print(f"done: {folder.name}", flush=True)
    return folder


def curve(output: Path, folder: Path) -> list[float]:
    """The scores of a run, in their order; of colour images the last one alone."""
    if folder.name.startswith("colour"):
        return [colour_distance(output / "colour", fdistill.load_student(folder))]
    records = read_records(folder / "metrics.jsonl")
    return [value for record in records for name, value in record.items() if name.endswith("fd_digits")]


@torch.no_grad()
def colour_distance(folder: Path, sample: Any) -> float:
    """The distance of samples to the training images, in the features that were trained on them."""
    device = torch.device("cpu")
    network = gpu_cifar10.Features(_FEATURES.feature_width, 10)
    network.load_state_dict(load_file(folder / "features.safetensors"))
    network.eval()
    references = open_npz(folder / "train.npz").images
    images, _ = gpu_cifar10.draw(sample, tuple(references.shape[1:]), SAMPLES, device)
    own, real = (Moments.of(gpu_cifar10.extract(network, each, device)[0]) for each in (images, references))
    return frechet_distance(own, real)


def score_of_teacher(output: Path, name: str) -> float:
    """With 35 evaluations."""
    if name == "colour":
        teacher = fdistill.load_teacher(output / "colour" / "teacher")
        return colour_distance(output / "colour", partial(heun_sample, teacher, num_steps=18))
    options: dict[str, Any] = {"samples": str(output / "edm-teacher")}
    if name == "digits":
        options = {"samples": "digits"}
    elif name == "t2i":
        options = {"samples": "digits-t2i", "protocol": "digits-t2i", "guidance_scale": 2.0}
    distance: float = evaluate(**options, metrics=["fd_digits"])["metrics"]["fd_digits"]
    return distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", help="rows whose name contains one of these, as in edm/,64")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cifar10", type=Path, help="archive of JPEG bytes, as for gpu_cifar10.py")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    rows = [f"{teacher}/{settings}" for settings in SETTINGS for teacher in TEACHERS]
    rows = [row for row in rows if not arguments.only or any(part in row for part in arguments.only.split(","))]
    if arguments.cifar10 is None:
        rows = [row for row in rows if not row.startswith("colour")]
    torch.set_num_threads(1)
    if any(row.startswith("edm") for row in rows) and not (output / "edm-teacher").is_dir():
        make_edm_teacher(output / "edm-teacher")
    if any(row.startswith("colour") for row in rows) and not (output / "colour" / "teacher").is_dir():
        make_colour_teacher(output / "colour", arguments.cifar10)
    jobs = [(row, seed) for seed in seeds for row in rows]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = dict(zip(jobs, pool.map(lambda job: distil(output, *job), jobs), strict=True))
    scores = {name: score_of_teacher(output, name) for name in dict.fromkeys(row.partition("/")[0] for row in rows)}
    curves = {row: [curve(output, folders[row, seed]) for seed in seeds] for row in rows}
    found = {"teachers": scores, "seeds": seeds, "curves": curves}
    (output / "settings.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| | teacher | 40 % | 60 % | 80 % | 100 % |\n|---|---|---|---|---|---|")
    for row in sorted(rows):
        own_score = scores[row.partition("/")[0]]
        places = range(-min(4, len(curves[row][0])), 0)
        cells = [""] * (4 - len(places))
        for place in places:
            values = [each[place] / own_score for each in curves[row]]
            cells.append(f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else ""))
        print(f"| {row} | {own_score:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

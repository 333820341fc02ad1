"""How fast students of several small teachers converge under different settings, at equal arithmetic.

    python scripts/study_settings.py OUTPUT_DIR [--only edm/] [--seeds 0,1,2] [--jobs 2] [--cifar10 TRAIN.npz]

A row is TEACHER/SETTINGS. Teachers differ in family, size, data and start: the embedded digits; an EDM network (DDPM++
with four blocks a level, sigma_data 0.75) that is trained here on the same digits, started at sigma 2.5 and at 80; the
embedded text-to-image teacher; and, with --cifar10, an EDM network of CIFAR-10 at 16 x 16. What is made already is
kept. The table has the Frechet distance of the last averages as a multiple of the teacher's, both means over five draws
of noise: between two draws it differs by a tenth. Several --seeds are runs of their own.
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

QUIET = ["log.samples_every=0", "log.tracker=none"]
SAMPLES = 5000  # of colour images
DRAWS = (0, 1, 2, 3, 4)
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
    average: str = "0.98"  # a decay, or sigma_rel=WIDTH
    schedule: str = "constant"
    gan_ratio: float = 0.0  # 0 has the weight that was the default, 1e-3
    critic_steps: int = 2
    warmup: int = 0

    def overrides(self, teacher: Teacher) -> list[str]:
        """For `fdistill distill`."""
        return [
            f"generator.lr={self.rate * teacher.rate}",
            f"fake_score.lr={self.rate * teacher.rate}",
            f"generator.lr_schedule={self.schedule}",
            "generator.lr_hold=50",
            f"generator.lr_warmup={self.warmup}",
            f"fake_score.lr_warmup={self.warmup}",
            f"generator.gan_gradient_ratio={self.gan_ratio}",
            f"batch_size={round(self.batch * teacher.batch)}",
            *self.averages(),
            f"critic_steps={self.critic_steps}",
            f"iterations={self.iterations(teacher)}",
        ]

    def averages(self) -> list[str]:
        """The one that is kept and exported."""
        kind, _, width = self.average.rpartition("=")
        kept = [f"ema.decays=[{'' if kind else width}]", f"ema.sigma_rel=[{width if kind else ''}]"]
        return [*kept, f"ema.export={self.average}"]

    def iterations(self, teacher: Teacher) -> int:
        """How many take the arithmetic of the teacher's number with all of its batch and two critic updates."""
        return round(teacher.iterations / self.batch * 3 / (1 + self.critic_steps))


_EDM = ["digits", "teacher=OUT/edm-teacher"]
TEACHERS = {
    "digits": Teacher(["digits"], 210),
    "edm": Teacher(_EDM, 490),
    "edm-80": Teacher([*_EDM, "student_level=80", "matching_levels.high=0.98", "critic_levels.high=1.0"], 490),
    "t2i": Teacher(["digits-t2i"], 150, batch=64, rate=1e-4),
    "colour": Teacher(
        [
            *("digits", "teacher=OUT/colour/teacher", "data=OUT/colour/train.npz"),
            *("matching_levels.high=0.75", "critic_levels.high=0.8"),  # study_levels.py
        ],
        160,
        batch=64,
    ),
}
_NOW = Setting(2, 0.5, "sigma_rel=0.1", "inverse-sqrt", 0.3, warmup=50)
SETTINGS = {
    "before": Setting(),
    "now": _NOW,
    "now, no warm-up": replace(_NOW, warmup=0),
    "now, one critic update": replace(_NOW, critic_steps=1),
    "now, whole batch": replace(_NOW, batch=1.0),
    "now, cosine": replace(_NOW, schedule="cosine"),
    "now, average 0.95": replace(_NOW, average="0.95"),
    "now, average 0.98": replace(_NOW, average="0.98"),
    "now, GAN 1e-3": replace(_NOW, gan_ratio=0.0),
    "now, GAN x 0.1": replace(_NOW, gan_ratio=0.1),
    "now, GAN x 1": replace(_NOW, gan_ratio=1.0),
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
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [f"seed={seed}", "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread)
    print(f"done: {folder.name}", flush=True)
    return folder


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


def distances(output: Path, name: str, folder: Path | None) -> list[float]:
    """Of the student in a folder, or of the teacher with 35 evaluations: one for each draw; of colour images one."""
    if name == "colour":
        sample: Any = None if folder is None else fdistill.load_student(folder)
        if sample is None:
            sample = partial(heun_sample, fdistill.load_teacher(output / "colour" / "teacher"), num_steps=18)
        return [colour_distance(output / "colour", sample)]
    own = {"digits": "digits", "t2i": "digits-t2i"}.get(name, str(output / "edm-teacher"))
    options: dict[str, Any] = {"samples": own if folder is None else str(folder)}
    if name == "t2i":
        options |= {"protocol": "digits-t2i"} | ({"guidance_scale": 2.0} if folder is None else {})
    found = evaluate(**options, metrics=["fd_digits"], seeds=DRAWS)["seeds"]
    return [draw["fd_digits"] for draw in found.values()]


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
    found = {row: [distances(output, row.partition("/")[0], folders[row, seed]) for seed in seeds] for row in rows}
    teachers = {name: distances(output, name, None) for name in dict.fromkeys(row.partition("/")[0] for row in rows)}
    made = {"teachers": teachers, "seeds": seeds, "draws": DRAWS, "students": found}
    (output / "settings.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print("| | teacher | student | x teacher |\n|---|---|---|---|")
    for row in sorted(rows):
        own, values = mean(teachers[row.partition("/")[0]]), [mean(draws) for draws in found[row]]
        ratios = [value / own for value in values]
        spread = f" ± {stdev(ratios):.2f}" if len(ratios) > 1 else ""
        print(f"| {row} | {own:.3f} | {mean(values):.3f} | {mean(ratios):.2f}{spread} |")


if __name__ == "__main__":
    main()

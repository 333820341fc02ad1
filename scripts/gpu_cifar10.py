"""On one GPU, without a network: a teacher trained on a copy of CIFAR-10, one-step students of it by three divergences,
and how far the samples of each are from the images.

    python scripts/gpu_cifar10.py [STAGE ...] --output DIR [--quick]

Stages, in this order: data, features, teacher, students, report; all by default. What is made already (in --work) is
kept, so an interrupted run goes on, and stages can be run in calls of their own. --quick tries everything out on any
machine, with made-up images, in a minute. Called by scripts/gpu_cifar10.sh; docs/cifar10.md says what the numbers are.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import train_edm_teacher
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fdistill
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.moments import Moments
from fdistill.base.devices import start
from fdistill.base.files import atomic_file
from fdistill.base.images import save_grid, save_side_by_side, to_uint8, to_unit
from fdistill.base.rng import indexed_normal
from fdistill.data.npz import open_npz
from fdistill.sampler import evaluations, heun_sample
from fdistill.training.journal import read_records

DIVERGENCES = ("reverse-kl", "forward-kl", "jensen-shannon")
HEUN_STEPS = (9, 18)  # of the teacher: 17 and 35 evaluations
STAGES = ("data", "features", "teacher", "students", "report")


@dataclass(frozen=True)
class Scale:
    """How large a run is; the second one is --quick."""

    teacher_minutes: float = 3.0
    teacher_channels: int = 64
    teacher_batch: int = 512
    student_minutes: float = 0.8
    student_batch: int = 128
    calibration: int = 40  # iterations
    feature_width: int = 64
    feature_epochs: int = 12
    samples: int = 10_000


QUICK = Scale(0.05, 16, 16, 0.02, 8, 12, 4, 1, 64)


class Features(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> (features [B, 4 width], class logits): a plain residual network."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.stem = self._block(3, width, 1)
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.downs = nn.ModuleList(self._block(inputs, outputs, 2) for inputs, outputs in pairwise(widths))
        self.residuals = nn.ModuleList(self._block(outputs, outputs, 1) for outputs in widths[1:])
        self.classifier = nn.Linear(4 * width, classes)

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for down, residual in zip(self.downs, self.residuals, strict=True):
            x = down(x)
            x = x + residual(x)
        features = x.mean((2, 3))
        return features, self.classifier(features)


def unpack_jpeg(source: Path, target: Path) -> int:
    """An archive of JPEG bytes, offsets and labels -> an .npz of images and labels that `data=` reads; how many."""
    with np.load(source, allow_pickle=False) as archive:
        content, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    images = [Image.open(io.BytesIO(content[a:b])).convert("RGB") for a, b in pairwise(offsets)]
    with atomic_file(target) as temporary, temporary.open("wb") as file:
        np.savez(file, images=np.stack([np.asarray(image) for image in images]), labels=labels.astype(np.int64))
    return len(images)


def made_up_jpeg(target: Path, count: int, seed: int) -> None:
    """Such an archive of made-up images: a class is a colour and a brightness gradient."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % 10
    parts = []
    for label in labels:
        colour = 128 + 100 * np.cos(2 * np.pi * (label / 10 + np.arange(3) / 3))
        ramp = np.linspace(-60, 60, 16)[:, None, None] * random.uniform(0.5, 1)
        noise = random.normal(0, 20, (16, 16, 3))
        file = io.BytesIO()
        Image.fromarray((colour + ramp + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        parts.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(target, jpeg=np.frombuffer(b"".join(parts), np.uint8), offsets=offsets, labels=labels)


def train_features(work: Path, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Trains the classifier whose features give the Frechet distance, and tests it on images it has not seen."""
    torch.manual_seed(0)
    train, test = open_npz(work / "train.npz"), open_npz(work / "test.npz")
    images, labels = train.images.to(device), train.labels.to(device)
    network = Features(scale.feature_width, 10).to(device)
    batch = min(512, len(images) // 4)
    steps = scale.feature_epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=max(steps, 2))
    began = time.perf_counter()
    for step in range(steps):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images), device=device)
        rows = order[(step % (len(images) // batch)) * batch :][:batch]
        x = _shifted(to_unit(images[rows]))
        loss = F.cross_entropy(network(x)[1], labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    _, classes = extract(network, test.images, device)
    save_file(network.state_dict(), work / "features.partial")
    (work / "features.partial").replace(work / "features.safetensors")
    return {
        "test_accuracy": (classes == test.labels).double().mean().item(),
        "feature_dim": 4 * scale.feature_width,
        "epochs": scale.feature_epochs,
        "seconds": time.perf_counter() - began,
    }


def _shifted(x: Tensor) -> Tensor:
    """Half of the batch mirrored, all of it moved by up to 4 pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
    top, left = torch.randint(0, 9, (2,)).tolist()
    size = x.shape[-1]
    return F.pad(x, (4, 4, 4, 4), mode="reflect")[:, :, top : top + size, left : left + size]


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """images uint8 [N, 3, S, S] -> (features [N, D], predicted classes [N]), on the CPU."""
    parts = [network(to_unit(part.to(device))) for part in images.split(1000)]
    return torch.cat([part[0] for part in parts]).cpu(), torch.cat([part[1] for part in parts]).argmax(1).cpu()


def distil(work: Path, scale: Scale, divergence: str) -> dict[str, Any]:
    """A student by one divergence, in about `student_minutes`; how long it took and how many iterations that was."""
    settings: dict[str, Any] = {
        "teacher": str(work / "teacher"),
        "data": str(work / "train.npz"),
        "divergence": divergence,
        "student_level": 2.5,
        "batch_size": scale.student_batch,
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "generator.lr": 2e-4,
        "fake_score.lr": 2e-4,
        "discriminator.lr": 1e-3,
        "matching_levels.high": 0.8,
        "critic_levels.high": 0.8,
        "ema.decays": [0.99],
        "ema.export": 0.99,
        "log.tracker": "none",
        "log.samples_every": 0,
    }
    calibration, run = work / "calibration", work / f"student-{divergence}"
    speed = work / "seconds-per-iteration.json"
    if not speed.is_file():  # once: a divergence is no more than another weight
        shutil.rmtree(calibration, ignore_errors=True)
        short = {"iterations": scale.calibration, "log.every": 4, "log.checkpoint_every": 0}
        fdistill.distill("digits", output=calibration, **settings | short)
        records = read_records(calibration / "metrics.jsonl")
        first, last = records[len(records) // 3], records[-1]  # kernels are compiled before
        each = (last["seconds"] - first["seconds"]) / (last["iteration"] - first["iteration"])
        with atomic_file(speed) as temporary:
            temporary.write_text(json.dumps(each), encoding="utf-8")
    iterations = max(8, int(60 * scale.student_minutes / json.loads(speed.read_text())))
    long = {
        "iterations": iterations,
        "log.every": max(1, iterations // 50),
        "log.checkpoint_every": -(-iterations // 3),
    }
    fdistill.distill("digits", output=run, resume=(run / "config.yaml").is_file(), **settings | long)
    seconds = read_records(run / "metrics.jsonl")[-1]["seconds"]
    return {"iterations": iterations, "batch_size": scale.student_batch, "minutes": seconds / 60}


def draw(sample: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], count: int, device: torch.device) -> Any:
    """(uint8 images [count, ...] on the CPU, images per second) of classes in turn and noise that everyone shares."""
    labels, parts = torch.arange(count) % 10, []
    batches = list(zip(indexed_normal(1, range(count), shape).split(500), labels.split(500), strict=True))
    began = time.perf_counter()
    for noise, classes in batches:
        parts.append(to_uint8(sample(noise.to(device), classes.to(device))).cpu())
    return torch.cat(parts), count / (time.perf_counter() - began)


@torch.no_grad()
def report(work: Path, out: Path, scale: Scale, facts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Draws, measures, and writes results.json, samples.png and the students' curves."""
    network = Features(scale.feature_width, 10).to(device)
    network.load_state_dict(load_file(work / "features.safetensors"))
    network.eval()
    references = {name: open_npz(work / f"{name}.npz").images for name in ("train", "test")}
    features = {name: extract(network, images, device)[0] for name, images in references.items()}
    teacher = fdistill.load_teacher(work / "teacher", device)
    shape = tuple(teacher.sample_shape)
    samplers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        f"teacher, {evaluations(steps)} evaluations": partial(heun_sample, teacher, num_steps=steps)
        for steps in HEUN_STEPS
    }
    samplers |= {
        f"student, {divergence}": fdistill.load_student(work / f"student-{divergence}", device)
        for divergence in DIVERGENCES
    }
    of_images = {key: Moments.of(values) for key, values in features.items()}
    distance = frechet_distance(of_images["test"], of_images["train"])
    rows: dict[str, Any] = {"test images": {"frechet_train": distance}}
    panels: list[tuple[str, Path]] = []
    for name, sample in samplers.items():
        images, speed = draw(sample, shape, scale.samples, device)
        own, classes = extract(network, images, device)
        rows[name] = {
            **{f"frechet_{key}": frechet_distance(Moments.of(own), moments) for key, moments in of_images.items()},
            "class_accuracy": (classes == torch.arange(len(images)) % 10).double().mean().item(),
            "images_per_second": speed,
        }
        picture = work / f"samples-{len(panels)}.png"
        save_grid(images[:80], picture)
        panels.append((name, picture))
    save_side_by_side(panels[1:], out / "samples.png")
    for divergence in DIVERGENCES:
        shutil.copy(work / f"student-{divergence}" / "curves.png", out / f"curves-{divergence}.png")
    result = {
        "what": "Frechet distances in features of a classifier trained here, on a JPEG copy of CIFAR-10; not FID",
        "samples": scale.samples,
        "distances": rows,
        **facts,
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "fdistill": fdistill.__version__,
        },
    }
    with atomic_file(out / "results.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{'':<26} {'to train':>9} {'to test':>9} {'accuracy':>9} {'images/s':>9}")
    for name, row in rows.items():
        cells = [row.get(key) for key in ("frechet_train", "frechet_test", "class_accuracy", "images_per_second")]
        print(f"{name:<26}" + "".join(f" {'' if cell is None else format(cell, '.4g'):>9}" for cell in cells))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", default=list(STAGES))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-cifar10"))
    parser.add_argument("--cifar10", type=Path, default=Path("data/cifar10-train-jpeg.npz"))
    parser.add_argument("--compile", action="store_true", help="torch.compile the teacher while it trains")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    unknown = sorted(set(options.stages) - set(STAGES))
    if unknown:
        parser.error(f"stage {unknown[0]!r}: expected some of {', '.join(STAGES)}")
    work, out, scale = options.work, options.output, QUICK if options.quick else Scale()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    _, device = start("auto")
    train_file = options.cifar10
    if options.quick:
        train_file = work / "made-up-train.npz"
        for seed, part in enumerate(("train", "test")):
            made_up_jpeg(work / f"made-up-{part}.npz", 400, seed)

    test_file = train_file.with_name(train_file.name.replace("train", "test"))

    def data() -> dict[str, Any]:
        return {
            f"{part}_images": unpack_jpeg(file, work / f"{part}.npz")
            for part, file in (("train", train_file), ("test", test_file))
        }

    def teacher() -> dict[str, Any]:
        return train_edm_teacher.make(
            work / "train.npz",
            work / "teacher",
            minutes=scale.teacher_minutes,
            batch_size=scale.teacher_batch,
            channels=scale.teacher_channels,
            compiled=options.compile,
        )

    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "data": data,
        "features": lambda: train_features(work, scale, device),
        "teacher": teacher,
        **{f"student-{name}": partial(distil, work, scale, name) for name in DIVERGENCES},
    }
    facts = {}
    for name, make in makers.items():
        record = work / f"{name}.json"  # written when a stage is done
        if not record.is_file() and name.split("-")[0].rstrip("s") in [stage.rstrip("s") for stage in options.stages]:
            began = time.perf_counter()
            made = make()
            with atomic_file(record) as temporary:
                temporary.write_text(json.dumps(made), encoding="utf-8")
            print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
        if record.is_file():
            facts[name] = json.loads(record.read_text(encoding="utf-8"))
    if "report" in options.stages:
        missing = [name for name in makers if name not in facts]
        if missing:
            parser.error(f"report: {', '.join(missing)} not made yet; run those stages first, with the same --work")
        report(work, out, scale, facts, device)


if __name__ == "__main__":
    main()

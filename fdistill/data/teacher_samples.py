"""Samples of a teacher's own sampler, made once and cached: they stand in for data, and are the pairs DMD regresses on.

Sample i comes from the noise `indexed_normal(0, [i])`, so a pair needs no stored noise.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from fdistill.base.files import cached_folder, made_once
from fdistill.base.hashes import hashed_tensors, save_hashed
from fdistill.base.rng import indexed_normal
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.sampler import heun_sample

TEACHER_SAMPLES = "teacher-samples"  #: data=teacher-samples

_SEED, _BATCH = 0, 256
_FILE, _FORMAT = "samples.safetensors", 3


@dataclass(frozen=True)
class SampleSet:
    """Which samples of which teacher: what the cache knows them by.

    Attributes:
        teacher: a hash of the teacher's weights, of what they mean, and of the conditions.
        count: how many, at least 1.
        num_steps: of Heun's method.
        start_level: where the sampler starts, with schedule.start(start_level) times standard normal noise.
    """

    teacher: str
    count: int
    num_steps: int
    start_level: float

    @property
    def evaluations(self) -> int:
        """Of the teacher for each sample: two for each of Heun's steps but the last."""
        return 2 * self.num_steps - 1

    @property
    def key(self) -> dict[str, object]:
        """Of the cache."""
        return {**asdict(self), "format": _FORMAT}

    @property
    def is_cached(self) -> bool:
        """Whether nothing has to be drawn."""
        return (cached_folder(TEACHER_SAMPLES, self.key) / _FILE).is_file()


@dataclass(frozen=True)
class TeacherSamples:
    """x0 float32 [N, C, H, W] on the CPU, and labels int64 [N], all classes in turn (zeros if there are none)."""

    x0: Tensor
    labels: Tensor

    def noise(self, rows: Tensor) -> Tensor:
        """[len(rows), C, H, W] float32: the noise that the sampler turned into these rows."""
        return indexed_normal(_SEED, rows.tolist(), self.x0.shape[1:])


def draw_samples(
    teacher: Denoiser,
    wanted: SampleSet,
    conditions: Callable[[range], Condition | None],
    *,
    device: torch.device,
    progress: bool = True,
) -> Tensor:
    """x0 float32 [N, C, H, W] on the CPU, of samples number 0 to N - 1 = `wanted.count` - 1.

    Args:
        teacher: on `device`.
        conditions: numbers of samples -> their labels or prompts, on the CPU, or None for an unconditional teacher.
        device: where to compute.
        progress: show a bar.
    """
    parts = []
    with tqdm(total=wanted.count, desc="teacher samples", unit="img", disable=not progress, mininterval=0.5) as bar:
        for first in range(0, wanted.count, _BATCH):
            rows = range(first, min(first + _BATCH, wanted.count))
            noise, asked = indexed_normal(_SEED, rows, teacher.sample_shape).to(device), conditions(rows)
            condition = None if asked is None else asked.to(device)
            x0 = heun_sample(teacher, noise, condition, wanted.num_steps, start_level=wanted.start_level)
            parts.append(x0.float().cpu())
            bar.update(len(rows))
    return torch.cat(parts)


def teacher_samples(wanted: SampleSet, num_classes: int | None, draw: Callable[[], Tensor]) -> TeacherSamples:
    """Reads samples from the cache, or puts into it what `draw` returns, as `draw_samples` does.

    Raises:
        OutputError: the cache folder cannot be written.
    """

    def fill(folder: Path) -> None:
        save_hashed({"x0": draw()}, folder / _FILE)

    labels = torch.arange(wanted.count) % (num_classes or 1)
    folder = made_once(TEACHER_SAMPLES, wanted.key, fill)
    try:
        return TeacherSamples(dict(hashed_tensors(folder / _FILE))["x0"], labels)
    except (OSError, SafetensorError, KeyError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)  # cut short by a full disk, or damaged: drawn anew
        folder = made_once(TEACHER_SAMPLES, wanted.key, fill)
        return TeacherSamples(dict(hashed_tensors(folder / _FILE))["x0"], labels)

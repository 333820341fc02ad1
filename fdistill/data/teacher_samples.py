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
from fdistill.sampler import heun_sample, heun_states

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
        stops: further levels, falling, at which the noisy samples are kept as well.
    """

    teacher: str
    count: int
    num_steps: int
    start_level: float
    stops: tuple[float, ...] = ()

    @property
    def evaluations(self) -> int:
        """Of the teacher for each sample: two for each of Heun's steps but the last."""
        return 2 * (self.num_steps + len(self.stops)) - 1

    @property
    def key(self) -> dict[str, object]:
        """Of the cache."""
        facts = asdict(self)
        if not self.stops:
            del facts["stops"]  # what was cached before there were any is still found
        return {**facts, "format": _FORMAT}

    @property
    def is_cached(self) -> bool:
        """Whether nothing has to be drawn."""
        return (cached_folder(TEACHER_SAMPLES, self.key) / _FILE).is_file()


@dataclass(frozen=True)
class TeacherSamples:
    """x0 float32 [N, C, H, W] on the CPU, labels int64 [N], all classes in turn (zeros if there are none), and of a set
    with K stops the noisy samples there, float32 [N, K, C, H, W].
    """

    x0: Tensor
    labels: Tensor
    states: Tensor | None = None

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
) -> dict[str, Tensor]:
    """ "x0", and with stops "states", as in `TeacherSamples`, of samples number 0 to N - 1 = `wanted.count` - 1.

    Args:
        teacher: on `device`.
        conditions: numbers of samples -> their labels or prompts, on the CPU, or None for an unconditional teacher.
        device: where to compute.
        progress: show a bar.
    """
    parts: list[tuple[Tensor, ...]] = []
    with tqdm(total=wanted.count, desc="teacher samples", unit="img", disable=not progress, mininterval=0.5) as bar:
        for first in range(0, wanted.count, _BATCH):
            rows = range(first, min(first + _BATCH, wanted.count))
            noise, asked = indexed_normal(_SEED, rows, teacher.sample_shape).to(device), conditions(rows)
            condition = None if asked is None else asked.to(device)
            found: tuple[Tensor, ...]
            if wanted.stops:
                found = heun_states(teacher, noise, condition, wanted.num_steps, (wanted.start_level, *wanted.stops))
            else:
                found = (heun_sample(teacher, noise, condition, wanted.num_steps, start_level=wanted.start_level),)
            parts.append(tuple(each.float().cpu() for each in found))
            bar.update(len(rows))
    return {name: torch.cat(each) for name, each in zip(("x0", "states"), zip(*parts, strict=True), strict=False)}


def teacher_samples(
    wanted: SampleSet, num_classes: int | None, draw: Callable[[], dict[str, Tensor]]
) -> TeacherSamples:
    """Reads samples from the cache, or puts into it what `draw` returns, as `draw_samples` does.

    Raises:
        OutputError: the cache folder cannot be written.
    """

    def fill(folder: Path) -> None:
        save_hashed(draw(), folder / _FILE)

    def read() -> TeacherSamples:
        tensors = dict(hashed_tensors(made_once(TEACHER_SAMPLES, wanted.key, fill) / _FILE))
        labels = torch.arange(wanted.count) % (num_classes or 1)
        return TeacherSamples(tensors["x0"], labels, tensors["states"] if wanted.stops else None)

    try:
        return read()
    except (OSError, SafetensorError, KeyError, ValueError):
        # Cut short by a full disk, or damaged: drawn anew.
        shutil.rmtree(cached_folder(TEACHER_SAMPLES, wanted.key), ignore_errors=True)
        return read()

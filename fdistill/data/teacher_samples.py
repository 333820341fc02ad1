"""Samples of a teacher's own sampler, made once and cached: they stand in for data, and are the pairs DMD regresses on.

Sample i comes from the noise `indexed_normal(0, [i])`, so a pair needs no stored noise.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from fdistill.base.files import atomic_file, cache_folder
from fdistill.base.rng import indexed_normal
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.sampler import heun_sample

_SEED, _BATCH = 0, 256


@dataclass(frozen=True)
class TeacherSamples:
    """x0 float32 [N, C, H, W] on the CPU, and labels int64 [N], all classes in turn (zeros if there are none)."""

    x0: Tensor
    labels: Tensor

    def noise(self, rows: Tensor) -> Tensor:
        """[len(rows), C, H, W] float32: the noise that the sampler turned into these rows."""
        return indexed_normal(_SEED, rows.tolist(), self.x0.shape[1:])


def teacher_samples(
    teacher: Denoiser,
    fingerprint: str,
    conditions: Callable[[range], Condition | None],
    *,
    count: int,
    num_steps: int,
    start_level: float,
    device: torch.device,
    progress: bool = True,
) -> TeacherSamples:
    """The first `count` samples, from the cache if they are there.

    Args:
        teacher: on `device`.
        fingerprint: of its weights, of what they mean and of the conditions: part of the cache's key.
        conditions: rows -> what the teacher is told for them: labels or prompts, on the CPU, or None.
        count: at least 1.
        num_steps: of Heun's method, 2 num_steps - 1 evaluations a sample.
        start_level: where the sampler starts, with schedule.start(start_level) times standard normal noise.
        device: where to compute.
        progress: show a bar.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    key = {
        "teacher": fingerprint,
        "count": count,
        "num_steps": num_steps,
        "start_level": start_level,
        "format": 2,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "teacher-samples" / f"{name}.safetensors"
    labels = torch.arange(count) % (teacher.num_classes or 1)
    try:
        return TeacherSamples(load_file(path)["x0"], labels)
    except (OSError, SafetensorError, KeyError):
        pass  # none yet, or one cut short: made anew
    parts = []
    with tqdm(total=count, desc="teacher samples", unit="img", disable=not progress, mininterval=0.5) as bar:
        for first in range(0, count, _BATCH):
            rows = range(first, min(first + _BATCH, count))
            noise = indexed_normal(_SEED, rows, teacher.sample_shape).to(device)
            told = conditions(rows)
            condition = None if told is None else told.to(device)
            parts.append(heun_sample(teacher, noise, condition, num_steps, start_level=start_level).float().cpu())
            bar.update(len(rows))
    x0 = torch.cat(parts).contiguous()
    own = path.with_name(f"{name}.{uuid.uuid4().hex}")  # another run may be making the same samples
    with atomic_file(own) as temporary:
        save_file({"x0": x0}, temporary)
    own.replace(path)
    return TeacherSamples(x0, labels)

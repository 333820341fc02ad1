"""Sample grids of a run: teacher and student from the same noise, classes and prompts."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.base.errors import DataError
from fdistill.base.images import to_uint8
from fdistill.condition import Condition
from fdistill.data import TEACHER_SAMPLES, Source
from fdistill.data.loader import decoded_rows
from fdistill.data.sample_loader import SampleSource
from fdistill.sampler import heun_sample
from fdistill.training.distillation import Distillation

# Samples in a grid, and of each prompt; the second for images above 64 pixels.
_GRID, _LARGE_GRID = (80, 5), (16, 4)


def _grid_count(run: Distillation) -> int:
    return (_LARGE_GRID if run.image_size > 64 else _GRID)[0]


def _grid_rows(run: Distillation) -> Tensor:
    """Rows of the prompts, evenly spaced, several samples of each after one another."""
    assert run.text is not None
    count, each = _LARGE_GRID if run.image_size > 64 else _GRID
    return torch.arange(count) // each * len(run.text.index) // (count // each)


def grid_prompts(run: Distillation) -> list[str]:
    """The prompts of the samples in a grid."""
    assert run.text is not None
    return run.text.prompts(_grid_rows(run))


def _grid_inputs(run: Distillation) -> tuple[Tensor, Condition | None]:
    teacher, device = run.networks.teacher, run.device
    count = _grid_count(run)
    noise = rng.indexed_normal(run.config.seed, range(count), run.student.noise_shape()).to(device)
    if run.text is not None:
        return noise, run.text.rows(_grid_rows(run)).to(device)
    return noise, torch.arange(count, device=device) % teacher.num_classes if teacher.num_classes else None


def grid_groups(run: Distillation) -> list[int]:
    """The class or prompt of each sample in a grid."""
    if run.text is not None:
        return list(run.text.index[_grid_rows(run)].tolist())
    classes = run.networks.teacher.num_classes or 1
    return [index % classes for index in range(_grid_count(run))]


def _images(run: Distillation, x0: Tensor) -> Tensor:
    return to_uint8(x0 if run.latents is None else run.latents.decode(x0))


def teacher_images(run: Distillation) -> Tensor:
    """Images sampled from the teacher by Heun's method."""
    noise, condition = _grid_inputs(run)
    noise = noise.reshape(len(noise), -1, *run.networks.teacher.sample_shape)[:, 0]
    return _images(run, heun_sample(run.networks.teacher, noise, condition))


@torch.no_grad()
def student_images(run: Distillation) -> Tensor:
    """Images sampled with the averaged weights that are exported, from the same noise at every call."""
    noise, condition = _grid_inputs(run)
    student = run.student
    with run.ema.applied(run.config.ema.export):
        images = _images(run, student.eval()(noise, condition))
    student.train()
    return images


def data_images(run: Distillation, source: Source | SampleSource) -> Tensor | None:
    """Images of the data of the grid's classes or prompts, uint8 [N, C, H, W]; None where the run reads no images, or
    images of several shapes.
    """
    if run.config.data in (None, TEACHER_SAMPLES) or getattr(source, "buckets", None) is not None:
        return None
    groups = run.text.index if run.text is not None else source.labels
    grouped = run.text is not None or run.networks.teacher.num_classes is not None
    rows, taken = [], Counter[int]()
    for group in grid_groups(run):
        alike = torch.nonzero(groups == group)[:, 0] if grouped else torch.arange(len(groups))
        if not len(alike):
            return None
        rows.append(int(alike[taken[group] % len(alike)]))
        taken[group] += 1
    if isinstance(source, SampleSource):
        return _images(run, source.samples(torch.tensor(rows), 0).to(run.device))
    try:
        return decoded_rows(source, rows, run.networks.teacher.sample_shape, run.config.images.recipe)
    except DataError:  # the loader counts it, and a run does not end for a picture
        return None

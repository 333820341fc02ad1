"""Generators: noise and a condition in, x0 out, in one evaluation or a few."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.kernels.checks import wide
from fdistill.kernels.layout import expand
from fdistill.kernels.renoise import renoise


class OneStepGenerator(nn.Module):
    """A denoiser used once, at a fixed level: x0 = denoise(schedule.start(level) * noise, level, condition).

    Args:
        denoiser: the student network, usually a copy of the teacher.
        level: where the student starts, in (t_min, t_max]; 80 for DMD2-style and 2.5 for SiD-style EDM students.
    """

    def __init__(self, denoiser: Denoiser, level: float):
        super().__init__()
        schedule = denoiser.schedule
        if not schedule.t_min < level <= schedule.t_max:
            raise ArgumentError(f"level: expected a number in ({schedule.t_min:g}, {schedule.t_max:g}], got {level:g}")
        self.denoiser = denoiser
        self.levels = (float(level),)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.denoiser.sample_shape

    @property
    def num_classes(self) -> int | None:
        return self.denoiser.num_classes

    def forward(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """Standard normal noise [B, C, H, W], labels [B] or None -> x0 [B, C, H, W] float32, nominally in [-1, 1]."""
        t = noise.new_full((len(noise),), self.levels[0], dtype=wide(noise.dtype))  # bfloat16 has no 999
        x_t = expand(self.denoiser.schedule.start(t), noise) * noise
        return cast(Tensor, self.denoiser(x_t, t, condition))


class FewStepGenerator(nn.Module):
    """A denoiser used at a few falling levels, each evaluation being noised again to the next level (consistency
    models' multistep sampling, arXiv 2303.01469, algorithm 1; DMD2, arXiv 2405.14867, section 4.4).

    Args:
        denoiser: the student network, usually a copy of the teacher.
        levels: falling, all in (t_min, t_max].
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[float]):
        super().__init__()
        schedule = denoiser.schedule
        falling = all(a > b for a, b in pairwise(levels))
        if not levels or not falling or not (schedule.t_min < levels[-1] and levels[0] <= schedule.t_max):
            raise ArgumentError(
                f"levels: expected falling numbers in ({schedule.t_min:g}, {schedule.t_max:g}], got {list(levels)}"
            )
        self.denoiser = denoiser
        self.levels = tuple(float(level) for level in levels)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.denoiser.sample_shape

    @property
    def num_classes(self) -> int | None:
        return self.denoiser.num_classes

    def forward(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """Standard normal noise [B, k, C, H, W] -> x0 [B, C, H, W] after the first k steps, k from 1 to all of them.

        Only the last of these evaluations has a gradient: a training step makes a sample for one of the steps from
        what the earlier ones give, as inference will (DMD2's backward simulation).
        """
        schedule = self.denoiser.schedule
        if noise.ndim != 5 or noise.shape[2:] != self.sample_shape or not 1 <= noise.shape[1] <= len(self.levels):
            wanted = ", ".join(str(size) for size in self.sample_shape)
            raise ArgumentError(f"noise: expected [B, 1 to {len(self.levels)}, {wanted}], got {tuple(noise.shape)}")
        last = noise.shape[1] - 1
        x0 = noise[:, 0]
        for k in range(last + 1):
            t = noise.new_full((len(noise),), self.levels[k], dtype=wide(noise.dtype))
            # At the first level nothing of a sample is there yet, and nothing is kept of what stands for it.
            signal, scale = (schedule.alpha(t), schedule.sigma(t)) if k else (torch.zeros_like(t), schedule.start(t))
            x_t, _ = renoise(x0, noise[:, k], signal, scale)
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == last):
                x0 = self.denoiser(x_t, t, condition)
        return x0


Generator = OneStepGenerator | FewStepGenerator


def student_generator(denoiser: Denoiser, levels: Sequence[float]) -> Generator:
    """The generator that takes one step for each level."""
    return OneStepGenerator(denoiser, levels[0]) if len(levels) == 1 else FewStepGenerator(denoiser, levels)


class Levelled(Protocol):
    """What takes one noise of `sample_shape` for each of its `levels`."""

    @property
    def levels(self) -> tuple[float, ...]:
        """Where noise is put in."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""


def noise_shape(generator: Levelled) -> tuple[int, ...]:
    """Shape of the noise of one sample: (C, H, W), or (steps, C, H, W) for more than one step."""
    steps = len(generator.levels)
    return generator.sample_shape if steps == 1 else (steps, *generator.sample_shape)

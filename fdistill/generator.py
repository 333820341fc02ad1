"""Generators map noise and a condition to x0, in one network evaluation or a few."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.kernels.checks import wide
from fdistill.kernels.layout import expand
from fdistill.kernels.renoise import renoise
from fdistill.noise import NoiseSchedule
from fdistill.student_kinds import fall


class Student(nn.Module, ABC):
    """The generator that a run trains and exports. `fdistill.students.kinds.KINDS` says how each kind is built and
    exported.

    Attributes:
        denoiser: its network.
        levels: the levels at which noise enters, falling: one for each network evaluation of an image.
    """

    denoiser: Denoiser
    levels: tuple[float, ...]

    @abstractmethod
    def forward(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """Standard normal noise [B, *noise_shape()] and a condition -> x0 [B, C, H, W], at least float32."""

    def sample_with_predictions(self, noise: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """The result of `forward`, and the noise [B, K, C, H, W] that K evaluations predicted on the way.

        Raises:
            ArgumentError: this kind of student predicts no noise while sampling (`StudentKind.predicts_noise`).
        """
        raise ArgumentError(f"noise_kl_weight: {type(self).__name__} predicts no noise while sampling; expected 0")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return self.denoiser.sample_shape

    @property
    def num_classes(self) -> int | None:
        """Labels are in [0, num_classes); None for a student without classes."""
        return self.denoiser.num_classes

    @property
    def network_levels(self) -> tuple[float, ...]:
        """The levels at which the network, or a part of it, runs. With the network, they define the student."""
        return self.levels

    def noise_shape(self, steps: int | None = None) -> tuple[int, ...]:
        """Shape of one sample's noise: (C, H, W), or (steps, C, H, W) for a student of a few steps.

        Args:
            steps: number of steps to take; all by default. One-step students ignore it.
        """
        return self.sample_shape

    def settings(self) -> dict[str, Any]:
        """The JSON values that a student's folder stores beside the network, so that the student can be rebuilt."""
        return {"levels": list(self.levels)}

    def describe(self) -> str:
        """A phrase for people that says how an image is made."""
        levels = ", ".join(f"{level:g}" for level in self.levels)
        return (
            f"one evaluation from level {levels}"
            if len(self.levels) == 1
            else (f"{len(self.levels)} evaluations at levels {levels}")
        )


def falling_levels(name: str, levels: Sequence[float], schedule: NoiseSchedule) -> tuple[float, ...]:
    """The levels as a tuple; ArgumentError, with their `name`, unless they fall and lie in (t_min, t_max]."""
    if not levels or not fall(levels) or not (schedule.t_min < levels[-1] and levels[0] <= schedule.t_max):
        raise ArgumentError(
            f"{name}: expected falling numbers in ({schedule.t_min:g}, {schedule.t_max:g}], got {list(levels)}"
        )
    return tuple(float(level) for level in levels)


class OneStepGenerator(Student):
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

    def forward(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """Standard normal noise [B, C, H, W], labels [B] or None -> x0 [B, C, H, W] float32, nominally in [-1, 1]."""
        t = noise.new_full((len(noise),), self.levels[0], dtype=wide(noise.dtype))  # bfloat16 cannot represent 999
        x_t = expand(self.denoiser.schedule.start(t), noise) * noise
        return cast(Tensor, self.denoiser(x_t, t, condition))


class FewStepGenerator(Student):
    """A denoiser used at a few falling levels; each x0-prediction is noised again to the next level (consistency
    models' multistep sampling, arXiv 2303.01469, algorithm 1; DMD2, arXiv 2405.14867, section 4.4).

    Args:
        denoiser: the student network, usually a copy of the teacher.
        levels: falling, all in (t_min, t_max].
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[float]):
        super().__init__()
        self.denoiser = denoiser
        self.levels = falling_levels("levels", levels, denoiser.schedule)

    def noise_shape(self, steps: int | None = None) -> tuple[int, ...]:
        return (steps or len(self.levels), *self.sample_shape)

    def forward(self, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """Standard normal noise [B, k, C, H, W] -> x0 [B, C, H, W] after the first k of the steps, k >= 1.

        Only the last of these evaluations has a gradient: a training step trains one of the steps on the output of the
        earlier ones, as at inference (DMD2's backward simulation).
        """
        schedule = self.denoiser.schedule
        if noise.ndim != 5 or noise.shape[2:] != self.sample_shape or not 1 <= noise.shape[1] <= len(self.levels):
            wanted = ", ".join(str(size) for size in self.sample_shape)
            raise ArgumentError(f"noise: expected [B, 1 to {len(self.levels)}, {wanted}], got {tuple(noise.shape)}")
        last = noise.shape[1] - 1
        x0 = noise[:, 0]
        for k in range(last + 1):
            t = noise.new_full((len(noise),), self.levels[k], dtype=wide(noise.dtype))
            # Before the first level there is no sample: x0 is a placeholder there, and its coefficient is 0.
            signal, scale = (schedule.alpha(t), schedule.sigma(t)) if k else (torch.zeros_like(t), schedule.start(t))
            x_t, _ = renoise(x0, noise[:, k], signal, scale)
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == last):
                x0 = self.denoiser(x_t, t, condition)
        return x0


def student_generator(denoiser: Denoiser, levels: Sequence[float]) -> OneStepGenerator | FewStepGenerator:
    """Builds the student that takes one step at each level."""
    return OneStepGenerator(denoiser, levels[0]) if len(levels) == 1 else FewStepGenerator(denoiser, levels)

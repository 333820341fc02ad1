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
from fdistill.noise import NoiseSchedule, add_noise, implied_noise
from fdistill.rollout import Rollout
from fdistill.student_kinds import Sampler, fall


class Student(nn.Module, ABC):
    """The generator that a run trains and exports. `fdistill.students.kinds.KINDS` says how each kind is built and
    exported.

    Attributes:
        denoiser: its network.
        levels: the levels at which noise enters, falling: one for each network evaluation of an image.
        first_trained: the index of the first level that is trained; those before it are another network's.
        end: the level at which another network goes on from its samples; 0 if they are finished.
    """

    denoiser: Denoiser
    levels: tuple[float, ...]
    first_trained: int = 0
    end: float = 0.0

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
    def denoisers(self) -> tuple[Denoiser, ...]:
        """All networks that it evaluates; its own comes last."""
        return (self.denoiser,)

    def resize(self, height: int, width: int) -> None:
        """Sets the height and width of its samples; raises what `Denoiser.resize` does."""
        for denoiser in self.denoisers:
            denoiser.resize(height, width)

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

    def noise_shape(self, rollout: Rollout | None = None) -> tuple[int, ...]:
        """Shape of one sample's noise: (C, H, W), or (steps, C, H, W) for a student that draws noise at every step.

        Args:
            rollout: of a `FewStepGenerator`; None takes all of its steps. Other students ignore it.
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
    """A denoiser used at a few falling levels, between which each x0-prediction is noised again.

    Args:
        denoiser: the student network, usually a copy of the teacher.
        levels: falling, all in (t_min, t_max].
        sampler: "stochastic" noises x0 with new noise (consistency models, arXiv 2303.01469, algorithm 1; DMD2, arXiv
            2405.14867, section 4.4); "deterministic" with the noise that x0 and x_t imply, (x_t - alpha x0) / sigma,
            which is an Euler step of the probability-flow ODE (DDIM, arXiv 2010.02502).
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[float], sampler: Sampler = "stochastic"):
        super().__init__()
        self.denoiser = denoiser
        self.levels = falling_levels("levels", levels, denoiser.schedule)
        self.sampler = sampler

    def noise_shape(self, rollout: Rollout | None = None) -> tuple[int, ...]:
        if self.sampler == "deterministic":
            return self.sample_shape
        return (len(self.levels if rollout is None else rollout.levels), *self.sample_shape)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sampler": self.sampler}

    @property
    def between(self) -> str:
        """A phrase that says what happens between two steps."""
        with_what = "new noise" if self.sampler == "stochastic" else "the noise that the step implies (Euler)"
        return f"the image is noised again, with {with_what}"

    def describe(self) -> str:
        return f"{super().describe()}; between two of them {self.between}"

    def denoiser_at(self, level: float) -> Denoiser:
        """The network that takes the step at a level."""
        return self.denoiser

    def implied_noise(self, first_x0: Tensor, noise: Tensor) -> Tensor:
        """The noise that the first step, from `noise` to an x0, implies; both [B, C, H, W]."""
        schedule = self.denoiser.schedule
        t = noise.new_full((len(noise),), self.levels[0], dtype=wide(noise.dtype))
        x_t = expand(schedule.start(t), noise) * noise
        return implied_noise(schedule, first_x0, x_t, t)

    def forward(self, noise: Tensor, condition: Condition | None = None, rollout: Rollout | None = None) -> Tensor:
        """Standard normal noise [B, *noise_shape(rollout)] and a condition -> x0 [B, C, H, W], at least float32.

        Only the last evaluation has a gradient unless the rollout says otherwise: a training step trains one of the
        steps on the output of the earlier ones, as at inference, or on data.

        Args:
            rollout: the levels to pass, and data to begin with; None passes all of the student's levels.
        """
        return self._steps(noise, condition, rollout)[0]

    def last_step(
        self, noise: Tensor, condition: Condition | None = None, rollout: Rollout | None = None
    ) -> tuple[Tensor, Tensor]:
        """The result of `forward`, and the noisy input x_t [B, C, H, W] of the last evaluation."""
        return self._steps(noise, condition, rollout)

    def _steps(self, noise: Tensor, condition: Condition | None, rollout: Rollout | None) -> tuple[Tensor, Tensor]:
        rollout, schedule = rollout or Rollout(self.levels), self.denoiser.schedule
        expected = self.noise_shape(rollout)
        if noise.shape[1:] != expected:
            wanted = ", ".join(str(size) for size in ("B", *expected))
            raise ArgumentError(f"noise: expected [{wanted}], got {tuple(noise.shape)}")
        stochastic, last = self.sampler == "stochastic", len(rollout.levels) - 1
        draws = noise.unbind(1) if stochastic else (noise,)
        x0, eps = rollout.x0, draws[0]
        for k, level in enumerate(rollout.levels):
            t = noise.new_full((len(noise),), level, dtype=wide(noise.dtype))
            eps = draws[k] if stochastic else eps
            if k == 0 and rollout.x_t is not None:
                x_t = rollout.x_t
            elif x0 is None:  # there is only noise: the first argument is a placeholder, whose coefficient is 0
                x_t, _ = renoise(eps, eps, torch.zeros_like(t), schedule.start(t))
            elif stochastic:
                x_t, _ = renoise(x0, eps, schedule.alpha(t), schedule.sigma(t))
            else:  # the operator has no gradient in the noise, which depends on the step before
                x_t = add_noise(schedule, x0, eps, t)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (k == last or rollout.trained == "all")):
                x0 = self.denoiser_at(level)(x_t, t, condition)
            if not stochastic and k < last:
                eps = implied_noise(schedule, x0, x_t, t)
        return cast(Tensor, x0), x_t


def student_generator(
    denoiser: Denoiser, levels: Sequence[float], sampler: Sampler = "stochastic"
) -> OneStepGenerator | FewStepGenerator:
    """Builds the student that takes one step at each level; `sampler` is for more than one, see `FewStepGenerator`."""
    return OneStepGenerator(denoiser, levels[0]) if len(levels) == 1 else FewStepGenerator(denoiser, levels, sampler)

"""One-step generators: noise and a condition in, x0 out, in a single evaluation."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fdistill.denoiser import Denoiser
from fdistill.errors import ArgumentError
from fdistill.noise import expand


class OneStepGenerator(nn.Module):
    """A denoiser used once, at a fixed level: x0 = denoise(sigma(level) * noise, level, condition).

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
        self.level = float(level)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.denoiser.sample_shape

    @property
    def num_classes(self) -> int | None:
        return self.denoiser.num_classes

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Standard normal noise [B, C, H, W], labels [B] or None -> x0 [B, C, H, W] float32, nominally in [-1, 1]."""
        t = noise.new_full((len(noise),), self.level)
        x_t = expand(self.denoiser.schedule.sigma(t), noise) * noise
        return cast(Tensor, self.denoiser(x_t, t, condition))

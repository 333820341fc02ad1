"""Students whose steps are taken by experts, each for an interval of noise (Phased DMD, arXiv 2510.27684).

A phase trains one expert on samples that the experts before it make. Its own samples, noised to the level at which the
next phase begins, are compared with the teacher's at that level and above: what is below is left to later phases. For
this x0 is noised to a level t above that one at once. By way of the phase's end s the sample would be the same in
distribution: x_s = alpha_s x0 + sigma_s e, noised further to t, has the mean alpha_t x0 and the variance sigma_t^2
wherever e is new noise. So plain denoising of x0 is the fake score's unbiased loss here, while the paper's sampler,
whose e depends on x0, needs a target of its own (its equation for the sub-interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from fdistill.base.errors import ArgumentError
from fdistill.denoiser import Denoiser
from fdistill.generator import FewStepGenerator


@dataclass(frozen=True)
class Phases:
    """How the steps of a student are divided.

    Attributes:
        levels: of all steps of all phases, falling.
        starts: the index of each phase's first level, rising from 0.
    """

    levels: tuple[float, ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        starts = self.starts
        if not starts or starts[0] or sorted({*starts, len(self.levels)}) != [*starts, len(self.levels)]:
            raise ArgumentError(
                f"starts: expected rising indices of {len(self.levels)} levels from 0, got {list(starts)}"
            )

    @classmethod
    def equal(cls, levels: Sequence[float], count: int) -> Phases:
        """So many phases with the same number of steps, or one more in the later ones."""
        return cls(tuple(levels), tuple(number * len(levels) // count for number in range(count)))

    def until(self, phase: int) -> tuple[float, ...]:
        """The levels of the phases up to this one, which is counted from 0."""
        return self.levels[: (*self.starts, len(self.levels))[phase + 1]]

    def counts(self) -> tuple[int, ...]:
        """The number of steps of each phase."""
        return tuple(end - start for start, end in pairwise((*self.starts, len(self.levels))))

    def end(self, phase: int) -> float:
        """The level at which the next phase begins; 0 for the last one."""
        return self.levels[self.starts[phase + 1]] if phase + 1 < len(self.starts) else 0.0

    def settings(self) -> dict[str, Any]:
        """JSON values from which `from_settings` makes the same."""
        return {"levels": list(self.levels), "starts": list(self.starts)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Phases:
        """Raises KeyError, TypeError or ValueError for values that `settings` does not return."""
        return cls(
            tuple(float(level) for level in settings["levels"]), tuple(int(start) for start in settings["starts"])
        )


class PhasedGenerator(FewStepGenerator):
    """The experts of the first phases, with new noise between the steps.

    Args:
        denoiser: the expert of the last of these phases, which alone is trained.
        phases: the student's phases, those that come later too.
        earlier: the experts before it, frozen, the one for the most noise first.
        levels: other levels to sample at than those of the phases so far. Each is taken by the expert of its interval.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        phases: Phases,
        earlier: Sequence[Denoiser] = (),
        levels: Sequence[float] | None = None,
    ):
        number = len(earlier)
        if number >= len(phases.starts):
            raise ArgumentError(f"earlier: expected at most {len(phases.starts) - 1} experts, got {number}")
        super().__init__(denoiser, levels or phases.until(number))
        self.phases = phases
        self.earlier = nn.ModuleList(earlier)
        self.first_trained, self.end = phases.starts[number], phases.end(number)

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        earlier: Any = self.earlier
        return (*earlier, self.denoiser)

    def denoiser_at(self, level: float) -> Denoiser:
        for number, expert in enumerate(self.denoisers[:-1]):
            if level > self.phases.end(number):
                return expert
        return self.denoiser

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "phases": self.phases.settings()}

    def describe(self) -> str:
        count, number = len(self.phases.starts), len(self.denoisers)
        return f"{super().describe()}; phase{'s 1 to' if number > 1 else ''} {number} of {count}, an expert each"

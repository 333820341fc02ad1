"""The options with which images are drawn from a checkpoint, shared by generate, evaluate and compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fdistill.base.errors import ArgumentError, did_you_mean

#: What runs a checkpoint: fdistill's own sampler, or the diffusers pipeline that the checkpoint is.
SAMPLERS = ("heun", "pipeline")

_STEPS = 18
_GUIDANCE_SCALE = 1.0


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a checkpoint. Options that are None (or "") have their defaults.

    Attributes:
        num_steps: sampler steps, at least 1; by default 18 of a teacher or pipeline, and those that a student learnt.
        guidance_scale: guidance of a teacher or pipeline; 1, which is no guidance, by default.
        guidance_teacher: a second network that a teacher's guidance leads away from; by default the teacher without its
            condition.
        negative_prompt: what the guidance of a text-to-image teacher or pipeline steers away from.
        resolution: side of the images in pixels, of a text-to-image teacher or pipeline; its own by default.
        network: "module:function" of a student whose network is the user's own code.
        sampler: "heun" for fdistill's own samplers, or "pipeline" for the checkpoint's own diffusers pipeline.

    Raises:
        ArgumentError: an unknown sampler, fewer than 1 step, or a network or guidance_teacher together with sampler
            "pipeline".
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance_teacher: str | None = None
    negative_prompt: str = ""
    resolution: int | None = None
    network: str | None = None
    sampler: str = "heun"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ArgumentError(f"sampler: got {self.sampler!r}; {did_you_mean(self.sampler, SAMPLERS)}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ArgumentError(f"steps: expected at least 1, got {self.num_steps}")
        for name, value in (("network", self.network), ("guidance_teacher", self.guidance_teacher)):
            if self.sampler == "pipeline" and value is not None:
                raise ArgumentError(
                    f"{name}: got {value!r} together with sampler 'pipeline', which runs no network of your own; "
                    "leave one of the two out"
                )

    @property
    def steps(self) -> int:
        """The number of steps, the default included."""
        return _STEPS if self.num_steps is None else self.num_steps

    @property
    def scale(self) -> float:
        """The guidance scale, the default included."""
        return _GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    def given(self, *options: str) -> list[str]:
        """Which of these options the user gave, by the names that the commands give them; of all if none is named."""
        values = {
            "steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_teacher": self.guidance_teacher,
            "negative_prompt": self.negative_prompt or None,
            "resolution": self.resolution,
            "network": self.network,
            "sampler": None if self.sampler == "heun" else self.sampler,
        }
        return [name for name in options or values if values[name] is not None]


def check_unread(why: str, given: Iterable[str]) -> None:
    """Raises ArgumentError if options were given that nothing would read, and says why."""
    names = list(given)
    if names:
        raise ArgumentError(f"{', '.join(names)}: {why}; leave {'it' if len(names) == 1 else 'them'} out")

"""The answers that need no checkpoint: hardware, steps and goal. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fdistill.base.errors import ArgumentError, OutputError, did_you_mean
from fdistill.base.files import check_file
from fdistill.student_kinds import MAX_STUDENT_STEPS

#: Goal -> what it means, as the question says it.
GOALS = {
    "quality": "the published settings of the nearest recipe",
    "diversity": "a divergence that punishes missing kinds of images",
    "speed": "less time for each iteration of the training",
    "lora": "a LoRA file to share, of a text-to-image teacher",
}
_HARDWARE = re.compile(r"(?:(?P<gpus>[1-9]\d{0,3}) ?x ?)?(?P<memory>\d{1,4}(?:\.\d+)?) ?gb")
#: What CUDA's context and the allocator's unused blocks take of a GPU (docs/memory.md), at most this share of it.
_CONTEXT, _CONTEXT_SHARE = 2e9, 0.2


@dataclass(frozen=True)
class Hardware:
    """What the run is for.

    Attributes:
        gpus: how many; 0 for a CPU.
        gigabytes: memory of each GPU.
    """

    gpus: int
    gigabytes: float

    @property
    def bytes(self) -> int:
        """What a run may take of a GPU."""
        whole = self.gigabytes * 1e9
        return int(whole - min(_CONTEXT, _CONTEXT_SHARE * whole))

    def __str__(self) -> str:
        if not self.gpus:
            return "cpu"
        return f"{self.gpus}x{self.gigabytes:g}gb" if self.gpus > 1 else f"{self.gigabytes:g}gb"


def read_hardware(text: str) -> Hardware:
    """Reads "cpu", "24gb" or "2x80gb"; raises ArgumentError for anything else."""
    if text.strip().lower() == "cpu":
        return Hardware(0, 0.0)
    match = _HARDWARE.fullmatch(text.strip().lower())
    if match is None or float(match["memory"]) == 0:
        raise ArgumentError(
            f"hardware: got {text!r}; expected cpu, the memory of a GPU as in 24gb, or several GPUs as in 2x80gb"
        )
    return Hardware(int(match["gpus"] or 1), float(match["memory"]))


def read_steps(text: str) -> int:
    """Reads the number of steps; raises ArgumentError outside 1 to 8."""
    if text.strip() not in {str(number) for number in range(1, MAX_STUDENT_STEPS + 1)}:
        raise ArgumentError(f"steps: got {text!r}; expected a whole number from 1 to {MAX_STUDENT_STEPS}")
    return int(text)


def read_goal(text: str, *, takes_prompts: bool) -> str:
    """Reads a goal.

    Args:
        takes_prompts: whether the teacher is a text-to-image pipeline, of which alone there are LoRA files.

    Raises:
        ArgumentError: there is no such goal, or not for this teacher.
    """
    goal = text.strip().lower()
    if goal not in GOALS:
        raise ArgumentError(f"goal: got {text!r}; {did_you_mean(goal, GOALS)}")
    if goal == "lora" and not takes_prompts:
        others = ", ".join(name for name in GOALS if name != "lora")
        raise ArgumentError(
            f"goal: got 'lora', but LoRA files are of text-to-image pipelines, which this teacher is not; expected "
            f"one of {others}"
        )
    return goal


def check_new(output: Path) -> None:
    """Raises OutputError unless a file of this name can be written, and there is none yet."""
    check_file(output)
    if output.exists():
        raise OutputError(
            f"output {output}: is there already, and is not overwritten; choose another name with --output, or remove "
            "the file"
        )

"""The kinds of students, as settings and files name them. Imports no torch.

`fdistill.students.kinds` says how each kind is built and exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

#: The file in a student's folder that says which kind it is and how it is made.
STUDENT_FILE = "fdistill_student.json"
#: The key in it with the sizes and hashes of the folder's other files.
NOTED_FILES = "files"

#: Values of the setting student.generator.
KindName = Literal["denoiser", "tiue"]

#: Values of the setting student.sampler, see `FewStepGenerator`.
Sampler = Literal["stochastic", "deterministic"]

MAX_STUDENT_STEPS = 8


@dataclass(frozen=True)
class StudentKind:
    """One row of `STUDENT_KINDS`.

    Attributes:
        evaluates: what it evaluates, for the help on student.generator.
        levels_key: the key in a student's file that holds the levels of its network. Its presence in the file
            identifies the kind; of several kinds whose keys are there, the last row's.
        steps: whether the student takes one step at each level of student_level, as many as the method supports.
        predicts_noise: whether it has `Student.sample_with_predictions`, which student.noise_kl_weight needs.
        pairs: whether it can learn from teacher pairs, which start at one level.
    """

    evaluates: str
    levels_key: str
    steps: bool
    predicts_noise: bool
    pairs: bool


STUDENT_KINDS: dict[KindName, StudentKind] = {
    "denoiser": StudentKind(
        "the whole network at every level of student_level",
        levels_key="levels",
        steps=True,
        predicts_noise=False,
        pairs=True,
    ),
    "tiue": StudentKind(
        "a UNet's encoder once and its decoder at every level",
        levels_key="decoder_levels",
        steps=False,
        predicts_noise=True,
        pairs=False,
    ),
}


def kinds_with(attribute: str) -> list[str]:
    """Names of the kinds for which an attribute of their row is true."""
    return [name for name, kind in STUDENT_KINDS.items() if getattr(kind, attribute)]


def fall(levels: Sequence[float]) -> bool:
    """Whether each level is below the one before it."""
    return all(a > b for a, b in pairwise(levels))

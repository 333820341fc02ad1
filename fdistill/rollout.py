"""Rollouts: which levels a few-step student's samples pass, and where they begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """How samples of a few-step student are made.

    In training, the last level alone is trained, unless all are. What it gets as input is made by the student itself,
    from noise ("backward simulation", DMD2, arXiv 2405.14867, section 4.5), or is data that is noised to that level.

    Attributes:
        levels: that are passed, falling; not empty.
        x0: [B, C, H, W] data in [-1, 1] to noise to the first of these levels; None starts from noise alone, which is
            right only where the first level is the student's own first.
        x_t: [B, C, H, W] the noisy input at the first of these levels, in place of noise or of noised data; the first
            noise is then not read.
        trained: whether the "last" evaluation alone has a gradient, or "all" have one.
    """

    levels: tuple[float, ...]
    x0: Tensor | None = None
    x_t: Tensor | None = None
    trained: Literal["last", "all"] = "last"


def levels_for(levels: Sequence[float], steps: int) -> tuple[float, ...]:
    """The levels with which a student that was trained at `levels` takes another number of steps.

    Fewer steps pass some of its levels, evenly spread from the first: of four, two steps pass the first and the third.
    More steps, which it has not learnt, pass levels between them as well; the last of them lie between its last level
    and zero.
    """
    count = len(levels)
    if steps <= count:
        return tuple(levels[index * count // steps] for index in range(steps))
    ends = [*levels, 0.0]
    places = [index * count / steps for index in range(steps)]
    return tuple(ends[int(at)] + (at - int(at)) * (ends[int(at) + 1] - ends[int(at)]) for at in places)

"""The largest values that settings may have, and a check of lists. Imports no torch.

They are far above what anybody trains with. A value beyond them is a slip of the pen, which would otherwise end in a
process that never answers, or that the system stops because memory is gone.
"""

from __future__ import annotations

from typing import Any

MAX_NUMBER = 1e30  # float32 ends at 3e38
MAX_COUNT = 10**9  # iterations, images
MAX_BATCH, MAX_WORKERS, MAX_BINS, MAX_RANK = 2**20, 1024, 10_000, 10_000
MAX_SIDE, MAX_STEPS = 2**14, 10_000
MAX_STAGES = 1_000


def distinct(values: list[Any]) -> list[Any]:
    """The list; ValueError if something is in it twice."""
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise ValueError(f"has {twice!r} twice; expected each once")
    return values

"""The largest values that settings may have, and checks of lists and of networks' configs. Imports no torch.

They are far above what anybody trains with. A value beyond them is a slip of the pen, which would otherwise end in a
process that never answers, or that the system stops because memory is gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fdistill.base.errors import shown

MAX_NUMBER = 1e30  # float32 ends at 3e38
MAX_COUNT = 10**9  # iterations, images
MAX_BATCH, MAX_WORKERS, MAX_BINS, MAX_RANK = 2**20, 1024, 10_000, 10_000
MAX_SIDE, MAX_STEPS = 2**14, 10_000
MAX_STAGES = 1_000

_MAX_LAYERS, _MAX_SIZE = 1_000, 10**6
_COUNTS_LAYERS = re.compile("layer|block|depth")


def distinct(values: list[Any]) -> list[Any]:
    """The list; ValueError if something is in it twice."""
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise ValueError(f"has {twice!r} twice; expected each once")
    return values


def check_network(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a network's config; ValueError for a number or a list of layers that no network has."""
    for key, value in _entries(settings, ""):
        size: float
        layers = _COUNTS_LAYERS.search(key) is not None
        if isinstance(value, (list, tuple)):
            size, most, unit = len(value), _MAX_LAYERS if layers else _MAX_SIZE, " entries"
        elif isinstance(value, (int, float)):
            size, most, unit = abs(value), _MAX_LAYERS if layers and "channels" not in key else _MAX_SIZE, ""
        else:
            continue
        if not size <= most:
            raise ValueError(f"{key}: got {shown(value, 60)}; expected at most {most:,}{unit}")
    return settings


def _entries(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Everything inside nested settings, lists included, with the name under which it stands."""
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _entries(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _entries(inner, key)

"""How large the config of a network may say that it is. Imports no torch.

The bounds are far above every network that is published. What is beyond them would take all memory, or never end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fdistill.base.errors import shown

_MAX_LAYERS, _MAX_SIZE = 1_000, 10**6
_COUNTS_LAYERS = re.compile("layer|block|depth")


def check_sizes(settings: dict[str, Any]) -> dict[str, Any]:
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

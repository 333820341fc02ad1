"""Cases that repeat what others prove in another guise: they run at night, since they would double the time of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def at_night(values: Iterable[Any], when: Callable[[Any], bool]) -> list[Any]:
    """Values for `parametrize`, of which those for which `when` holds are marked `thorough`."""

    def marked(value: Any) -> Any:
        arguments = value if isinstance(value, tuple) and not callable(value) else (value,)
        return pytest.param(*arguments, marks=pytest.mark.thorough)

    return [marked(value) if when(value) else value for value in values]

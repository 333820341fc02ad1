"""Cases that repeat what others prove in another guise: they run at night, since they would double the time of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def at_night(values: Iterable[Any], when: Callable[[Any], bool]) -> list[Any]:
    """Values or parameters for `parametrize`, of which those for whose first value `when` holds are marked `thorough`.

    A tuple is several values for `parametrize`, and `when` gets it whole.
    """

    def marked(value: Any) -> Any:
        marks = [pytest.mark.thorough]
        if isinstance(value, ParameterSet):
            return pytest.param(*value.values, marks=[*value.marks, *marks])
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)

    def of(value: Any) -> Any:
        return value.values[0] if isinstance(value, ParameterSet) else value

    return [marked(value) if when(of(value)) else value for value in values]

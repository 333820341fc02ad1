"""Settings that are computed with tensors, also while a plan counts with tensors that have no values."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def constant(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function that makes numbers of its arguments alone: its tensors have values under torch's
    FakeTensorMode, too.
    """

    @wraps(function)
    def with_values(*arguments: _P.args, **options: _P.kwargs) -> _R:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            return function(*arguments, **options)

    return with_values

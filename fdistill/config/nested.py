"""Settings in sections: merged, and under dotted names. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, in which those of `over` replace those of `under`; of a section object, those that were set."""
    found = dict(under)
    for key, value in over.items():
        inner = found.get(key)
        if isinstance(inner, Mapping) and isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        found[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested settings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

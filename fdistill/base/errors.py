"""One exception family. Every message says what was wrong, where, and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FDistillError",
    "NonFiniteError",
    "OutputError",
    "ProcessError",
    "StoppedError",
]

_FEW = 12  # names that a message lists


class FDistillError(Exception):
    """Base of every error that a user can cause, and can put right."""


class ConfigError(FDistillError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class ArgumentError(FDistillError, ValueError):
    """A function was called with tensors or values it cannot work on."""


class CheckpointError(FDistillError):
    """A teacher, student or training checkpoint is missing, truncated or of another architecture."""


class DataError(FDistillError):
    """Training data are missing, unreadable, or not what was expected of them."""


class OutputError(FDistillError):
    """An output path cannot be written, or belongs to something else."""


class ProcessError(FDistillError):
    """One of several processes is missing, has ended, or cannot be reached."""


class StoppedError(FDistillError):
    """A signal stopped a run, which was saved first.

    Attributes:
        status: the exit status of a command that is stopped by this signal.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class NonFiniteError(FDistillError):
    """A loss, a gradient or an image became NaN or infinite; nothing of it was saved."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence with the nearest valid choice, and with all of them if they are few."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = ", ".join(known[:_FEW]) + (f" and {len(known) - _FEW} others" if len(known) > _FEW else "")
    if near:
        return f"did you mean {near[0]!r}?" + (f" (known: {listed})" if len(known) <= _FEW else "")
    return f"known: {listed}"


def shown(value: object, most: int = 200) -> str:
    """A value as `repr` writes it, cut to a length that a message can hold."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} characters)"


def brief(error: Exception) -> str:
    """The first 160 characters of another library's message, on one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__

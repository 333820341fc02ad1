"""Scores for a student's card: those of its own run, or those of a file that `fdistill evaluate` wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdistill.base.errors import ArgumentError
from fdistill.base.files import read_json_object
from fdistill.base.reading import reason_of
from fdistill.sharing.private import public_name

_PREFIX = "eval/"


@dataclass(frozen=True)
class Score:
    """A measured number.

    Attributes:
        name: as evaluate names it: "fid", "fd_digits@500".
        value: a finite number.
        protocol: the protocol that it was measured by.
        spread: its spread and of what, "0.02 (20 bootstrap replicates)"; empty if it has none.
        against: the reference; empty if it is not known.
    """

    name: str
    value: float
    protocol: str
    spread: str = ""
    against: str = ""


def own_scores(facts: Mapping[str, Any], config: Mapping[str, Any], near: Path) -> list[Score]:
    """The scores in the record of the iteration at which a student was exported, best/ or the last.

    Args:
        facts: what the student's JSON file says, with a copy of that record of metrics.jsonl.
        config: the run's settings, which name the protocol.
        near: the student's folder.
    """
    record, watched = facts.get("metrics"), config.get("eval")
    if not isinstance(record, Mapping):
        return []
    protocol = str(watched.get("protocol", "unknown")) if isinstance(watched, Mapping) else "unknown"
    return [
        Score(public_name(name.removeprefix(_PREFIX), near), float(value), protocol)
        for name, value in record.items()
        if name.startswith(_PREFIX) and _is_finite(value)
    ]


def scores_of_files(paths: Sequence[Path], sha256: str, near: Path) -> list[Score]:
    """The scores in JSON files of `fdistill evaluate --output`.

    Args:
        sha256: of the student's weights, which the files must be about if they say whose scores they hold.
        near: the student's folder.

    Raises:
        ArgumentError: a file is no such file, has no scores, or is about other weights.
    """
    return [score for path in paths for score in _scores_of_file(path, sha256, near)]


def _scores_of_file(path: Path, sha256: str, near: Path) -> list[Score]:
    try:
        result = read_json_object(path)
        metrics, spreads, about = result["metrics"], result.get("spread", {}), result["provenance"]
        protocol, reference = str(about["protocol"]), about.get("reference")
        against = public_name(str((reference or {}).get("name", "")), near)
        spread = {name: f"{float(one['value']):.2g} ({one['of']})" for name, one in spreads.items()}
        found = [
            Score(public_name(name, near), float(value), protocol, spread.get(name, ""), against)
            for name, value in metrics.items()
            if _is_finite(value)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else reason_of(error)
        raise ArgumentError(f"scores {path}: {why}; expected a file of `fdistill evaluate --output`") from error
    if not found:
        raise ArgumentError(f"scores {path}: has no scores; expected a file of `fdistill evaluate --output`")
    theirs = about.get("checkpoint_sha256")
    if theirs not in (None, sha256):
        raise ArgumentError(
            f"scores {path}: are of {about.get('checkpoint', 'a checkpoint')} with other weights (hash "
            f"{str(theirs)[:12]}, and this student's is {sha256[:12]}); evaluate this student, and pass that file"
        )
    return found


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

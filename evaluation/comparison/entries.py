"""Results of one protocol as rows of a comparison, and what in them was not measured as in the others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from evaluation.metrics.score import Score
from fdistill.base.errors import ArgumentError, did_you_mean

#: Metrics that say nothing of a reference.
_WITHOUT_REFERENCE = ("inception_score", "*accuracy", "*diversity*", "clip*", "ink_*")

_FULL_NAME = "measured as"
_AGAIN = "write it again with `fdistill evaluate --output`"


@dataclass(frozen=True)
class Entry:
    """One result.

    Attributes:
        name: short, and no other entry's.
        result: as `evaluate` returned it.
        scores: by metric, without what the name of the number says of its circumstances ("fid" for "fid@5000").
        full_names: {"fid": "fid@5000"}.
        unlike: by metric, in what it was measured otherwise than most; such a number is not ranked.
        evaluations_per_image, seconds_per_image: None where not known.
        device: what the seconds were measured on; "" where not known.
    """

    name: str
    result: Mapping[str, Any]
    scores: Mapping[str, Score]
    full_names: Mapping[str, str]
    evaluations_per_image: float | None = None
    seconds_per_image: float | None = None
    device: str = ""
    unlike: Mapping[str, str] = field(default_factory=dict)

    @property
    def provenance(self) -> Mapping[str, Any]:
        provenance: Mapping[str, Any] = self.result["provenance"]
        return provenance

    @property
    def protocol(self) -> str:
        return str(self.provenance["protocol"])


@dataclass(frozen=True)
class Comparison:
    """Entries of one protocol.

    Attributes:
        metrics: the columns; the first is the one that is drawn.
    """

    protocol: str
    metrics: tuple[str, ...]
    entries: tuple[Entry, ...]

    def usual(self, metric: str) -> Entry:
        """The first entry whose number was measured as most are."""
        return next(entry for entry in self.entries if metric in entry.scores and metric not in entry.unlike)

    def full_name(self, metric: str) -> str:
        """What most entries call it: "fid@5000" if it is of 5,000 samples in them."""
        return self.usual(metric).full_names[metric]


def read_entry(name: str, where: str, result: Mapping[str, Any]) -> Entry:
    """The row of a result; `where` it is from is for messages.

    Raises:
        ArgumentError: it is not what `evaluate` writes.
    """
    metrics, provenance = result.get("metrics"), result.get("provenance")
    if not isinstance(metrics, dict) or not isinstance(provenance, dict) or not metrics:
        raise ArgumentError(f"{where}: has no metrics and provenance, as results of `fdistill evaluate` have; {_AGAIN}")
    if not isinstance(provenance.get("protocol"), str):
        raise ArgumentError(f"{where}: does not name its protocol; {_AGAIN}")
    spreads = result.get("spread")
    spreads = spreads if isinstance(spreads, dict) else {}
    scores: dict[str, Score] = {}
    full_names: dict[str, str] = {}
    for full_name, value in metrics.items():
        metric = re.split("[@ ]", full_name, maxsplit=1)[0]
        if metric in scores:
            raise ArgumentError(
                f"{where}: has {full_names[metric]!r} and {full_name!r}; expected one number for {metric!r}"
            )
        score = Score(_number(value, f"{where}: metrics, {full_name}"))
        if full_name in spreads:
            spread = spreads[full_name] if isinstance(spreads[full_name], dict) else {}
            width = _number(spread.get("value"), f"{where}: spread of {full_name}")
            score = replace(score, spread=abs(width), spread_of=str(spread.get("of", "")))
        scores[metric] = score
        full_names[metric] = full_name
    evaluations, seconds = (
        _positive(provenance.get(key), f"{where}: {key}") for key in ("evaluations_per_image", "seconds_per_image")
    )
    return Entry(name, result, scores, full_names, evaluations, seconds, str(provenance.get("device") or ""))


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArgumentError(f"{where}: got {value!r}, expected a finite number; {_AGAIN}")
    return float(value)


def _positive(value: object, where: str) -> float | None:
    number = None if value is None else _number(value, where)
    if number is not None and number <= 0:
        raise ArgumentError(f"{where}: got {value!r}, expected a number above 0, or null; {_AGAIN}")
    return number


def comparison_of(entries: Sequence[Entry], metrics: Sequence[str] | None = None) -> Comparison:
    """Entries of one protocol in one table, in which numbers that may not be ranked are found.

    Args:
        metrics: which, in this order; by default all, in the order in which results name them, from the first one that
            all entries have.

    Raises:
        ArgumentError: a metric that none has, or no metric that all have.
    """
    known = list(dict.fromkeys(metric for entry in entries for metric in entry.scores))
    for metric in metrics or ():
        if metric not in known:
            raise ArgumentError(f"metrics: no result has {metric!r}; {did_you_mean(metric, known)}")
    if not metrics:
        drawn = next((metric for metric in known if all(metric in entry.scores for entry in entries)), None)
        if drawn is None:
            has = "; ".join(f"{entry.name} has {', '.join(entry.scores)}" for entry in entries)
            raise ArgumentError(f"no metric that all have: {has}; evaluate them again with the same metrics")
        metrics = (drawn, *(metric for metric in known if metric != drawn))
    unlike: dict[str, dict[str, str]] = {entry.name: {} for entry in entries}
    for metric in metrics:
        for name, sentence in _unlike(metric, [entry for entry in entries if metric in entry.scores]).items():
            unlike[name][metric] = sentence
    rows = tuple(replace(entry, unlike=unlike[entry.name]) for entry in entries)
    return Comparison(entries[0].protocol, tuple(dict.fromkeys(metrics)), rows)


def _unlike(metric: str, entries: Sequence[Entry]) -> dict[str, str]:
    """{name: in what its number was measured otherwise} of entries unlike most; in a tie, unlike the first."""
    facts = [_facts(entry, metric) for entry in entries]
    told_by_all = [fact for fact in facts[0] if all(fact in found for found in facts)]
    usual = max(facts, key=lambda one: sum(all(one[fact] == other[fact] for fact in told_by_all) for other in facts))
    found: dict[str, str] = {}
    for entry, own in zip(entries, facts, strict=True):
        different = [fact for fact in told_by_all if own[fact] != usual[fact]]
        if different:
            said = [fact for fact in different if fact != _FULL_NAME] or different
            found[entry.name] = "; ".join(f"{fact} {own[fact]}, others {usual[fact]}" for fact in said)
    return found


def _facts(entry: Entry, metric: str) -> dict[str, str]:
    """Circumstances that a number depends on, as far as they are told; its full name repeats some of them."""
    told = entry.provenance
    facts = {"samples": str(told.get("num_samples", "unknown"))}
    facts["files"] = "lossy" if told.get("lossy_files") else "lossless"
    if not any(fnmatchcase(metric, pattern) for pattern in _WITHOUT_REFERENCE):
        facts["reference"] = identity(told.get("reference"))
    facts |= {key: str(told[key]) for key in ("recipe", "resolution") if told.get(key)}
    if told.get("prompts_sha256"):
        facts["prompts"] = str(told["prompts_sha256"])[:8]
    extractors = told.get("extractors")
    for name, extractor in extractors.items() if isinstance(extractors, dict) else ():
        facts[f"extractor {name}"] = identity(extractor)
    return facts | {_FULL_NAME: entry.full_names[metric]}


def identity(told: object) -> str:
    """What tells a file, a data set or a network apart, in words: name, hash of the content, how it is prepared."""
    if not isinstance(told, dict):
        return str(told or "none")
    words = (
        PurePath(str(told.get("name") or "")).name,
        str(told.get("sha256") or "")[:8],
        *(f"({told[key]})" for key in ("recipe", "preparation") if told.get(key)),
    )
    return " ".join(word for word in words if word)

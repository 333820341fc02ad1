"""Results of one protocol as rows of a comparison, and which of their scores were measured in another way than most."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from evaluation.metrics.score import Score
from evaluation.protocols import find_metric
from fdistill.base.errors import ArgumentError, did_you_mean

_FULL_NAME = "measured as"
_AGAIN = "write it again with `fdistill evaluate --output`"


@dataclass(frozen=True)
class Entry:
    """One result, a row of the comparison.

    Attributes:
        name: short name of the row; each entry has another.
        result: as `evaluate` returned it.
        scores: by metric, the plain name: "fid" for a score called "fid@5000".
        full_names: {"fid": "fid@5000"}.
        evaluations_per_image, seconds_per_image: None if not known.
        device: on which the seconds were measured; "" if not known.
        unlike: by metric, how its measurement differs from most entries' ("samples 10, others 50000"). Such scores are
            not ranked.
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
        metrics: the columns; the figure draws the first.
        entries: the rows.
    """

    protocol: str
    metrics: tuple[str, ...]
    entries: tuple[Entry, ...]

    def usual(self, metric: str) -> Entry:
        """The first entry whose score was measured in the way most were."""
        return next(entry for entry in self.entries if metric in entry.scores and metric not in entry.unlike)

    def full_name(self, metric: str) -> str:
        """What most entries call the metric, such as "fid@5000" for 5,000 samples."""
        return self.usual(metric).full_names[metric]


def read_entry(name: str, where: str, result: Mapping[str, Any]) -> Entry:
    """The row of a result.

    Args:
        where: where it comes from, for messages.

    Raises:
        ArgumentError: `evaluate` writes no such result.
    """
    metrics, provenance = result.get("metrics"), result.get("provenance")
    if not isinstance(metrics, dict) or not isinstance(provenance, dict) or not metrics:
        raise ArgumentError(
            f"{where}: has no metrics or no provenance, which results of `fdistill evaluate` have; {_AGAIN}"
        )
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
    """The comparison of entries of one protocol; finds the scores that must not be ranked.

    Args:
        metrics: the columns, in this order. By default all metrics in the order of the results, but the first one that
            all entries have comes first.

    Raises:
        ArgumentError: no entry has one of the metrics, or there is no metric that all entries have.
    """
    known = list(dict.fromkeys(metric for entry in entries for metric in entry.scores))
    for metric in metrics or ():
        if metric not in known:
            raise ArgumentError(f"metrics: no result has {metric!r}; {did_you_mean(metric, known)}")
    if not metrics:
        drawn = next((metric for metric in known if all(metric in entry.scores for entry in entries)), None)
        if drawn is None:
            has = "; ".join(f"{entry.name} has {', '.join(entry.scores)}" for entry in entries)
            raise ArgumentError(f"there is no metric that all have: {has}; evaluate them again with the same metrics")
        metrics = (drawn, *(metric for metric in known if metric != drawn))
    unlike: dict[str, dict[str, str]] = {entry.name: {} for entry in entries}
    for metric in metrics:
        for name, sentence in _unlike(metric, [entry for entry in entries if metric in entry.scores]).items():
            unlike[name][metric] = sentence
    rows = tuple(replace(entry, unlike=unlike[entry.name]) for entry in entries)
    return Comparison(entries[0].protocol, tuple(dict.fromkeys(metrics)), rows)


def _unlike(metric: str, entries: Sequence[Entry]) -> dict[str, str]:
    """{name of entry: how its measurement differs from most entries'}; in a tie the first ones count as most."""
    facts = [_facts(entry, metric) for entry in entries]
    common = [fact for fact in facts[0] if all(fact in found for found in facts)]
    usual = max(facts, key=lambda one: sum(all(one[fact] == other[fact] for fact in common) for other in facts))
    found: dict[str, str] = {}
    for entry, own in zip(entries, facts, strict=True):
        different = [fact for fact in common if own[fact] != usual[fact]]
        if different:
            said = [fact for fact in different if fact != _FULL_NAME] or different
            found[entry.name] = "; ".join(f"{fact} {own[fact]}, others {usual[fact]}" for fact in said)
    return found


def _facts(entry: Entry, metric: str) -> dict[str, str]:
    """What a score depends on, as far as its provenance says; its full name repeats some of this."""
    provenance = entry.provenance
    facts = {"samples": str(provenance.get("num_samples", "unknown"))}
    facts["files"] = "lossy" if provenance.get("lossy_files") else "lossless"
    known = find_metric(metric)
    if known is None or known.against is not None:
        facts["reference"] = identity(provenance.get("reference"))
    facts |= {key: str(provenance[key]) for key in ("recipe", "resolution") if provenance.get(key)}
    if provenance.get("prompts_sha256"):
        facts["prompts"] = str(provenance["prompts_sha256"])[:8]
    extractors = provenance.get("extractors")
    for name, extractor in extractors.items() if isinstance(extractors, dict) else ():
        facts[f"extractor {name}"] = identity(extractor)
    return facts | {_FULL_NAME: entry.full_names[metric]}


def identity(facts: object) -> str:
    """A file, data set or network in words: its name, the hash of its content, how images are prepared for it."""
    if not isinstance(facts, dict):
        return str(facts or "none")
    words = (
        PurePath(str(facts.get("name") or "")).name,
        str(facts.get("sha256") or "")[:8],
        *(f"({facts[key]})" for key in ("recipe", "preparation") if facts.get(key)),
    )
    return " ".join(word for word in words if word)

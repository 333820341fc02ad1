"""References, which samples are compared with: images, or statistics of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.extractors import Extractor
from evaluation.features import Extraction, Reading, Rows, cached_moments, cached_rows
from evaluation.images import Images, open_views
from evaluation.metrics.moments import Moments
from evaluation.protocols.protocol import Protocol
from evaluation.statistics_files import Statistics, read_statistics
from fdistill.base.errors import ArgumentError
from fdistill.base.reading import ARCHIVE_ERRORS
from fdistill.data.account import say

_KEPT_ROWS = 100_000  # of more images only moments are computed, which need little memory


class Reference:
    """Images, statistics of images, or both: ADM's files hold statistics of all images and some of the images.

    Args:
        name: what messages and provenance call it.
        views: its images as each view prepares them, "" being the protocol's own view; empty for statistics alone.
        statistics: None for images alone.
        is_protocols: whether it is the reference that the protocol names. Scores against another say so in their names.
    """

    def __init__(self, name: str, views: Mapping[str, Images], statistics: Statistics | None, is_protocols: bool):
        self.name, self.views, self.statistics, self.is_protocols = name, views, statistics, is_protocols
        self._rows: Rows = {} if statistics is None else dict(statistics.rows)
        self._moments: dict[str, Moments] = {}

    @property
    def has_rows(self) -> bool:
        """Whether metrics that read the features of every image can be computed."""
        return bool(self.views) or bool(self._rows)

    @property
    def count(self) -> int | None:
        """Number of images behind it; None if a statistics file does not say."""
        return self.statistics.count if self.statistics is not None else len(self.views[""])

    @property
    def resolution(self) -> str | None:
        """Width and height of its prepared images, as "32x32"; None if a statistics file does not say."""
        if self.statistics is None:
            return str(self.views[""].facts["resolution"])
        side = self.statistics.resolution
        return None if side is None else f"{side}x{side}"

    def moments(self, extractors: Mapping[str, Extractor], extraction: Extraction) -> Mapping[str, Moments]:
        """Mean and covariance of every output of the extractors, by "label.output".

        Args:
            extractors: by label, as in `features.Reading`.

        Raises:
            ArgumentError: it holds statistics of other features.
        """
        if self.statistics is not None:
            _check_features(self.statistics, extractors)
            return self.statistics.moments
        missing = [r for r in self._readings(extractors) if not r.widths.keys() <= self._moments.keys()]
        if len(self.views[""]) <= _KEPT_ROWS:
            self.rows({reading.label: reading.extractor for reading in missing}, extraction)
        streamed = [reading for reading in missing if not reading.widths.keys() <= self._rows.keys()]
        if streamed:
            self._moments |= cached_moments(streamed, extraction)
        names = [name for reading in missing if reading not in streamed for name in reading.widths]
        self._moments |= {name: Moments.of(self._rows[name]) for name in names}
        return self._moments

    def rows(self, extractors: Mapping[str, Extractor], extraction: Extraction) -> Rows:
        """Features of every image, by "label.output".

        Raises:
            ArgumentError: it holds statistics of other features, or no images.
        """
        if self.statistics is not None and self._rows:
            _check_features(self.statistics, extractors)
        missing = {
            label: extractor
            for label, extractor in extractors.items()
            if not any(name.split(".")[0] == label for name in self._rows)
        }
        if missing and not self.views:
            raise ArgumentError(
                f"reference {self.name}: has neither images nor their features by {', '.join(missing)}; pass the "
                "images themselves, or leave out the metrics that need them"
            )
        if missing:
            readings = self._readings(missing)
            self._rows |= cached_rows(readings, extraction)
        return self._rows

    def _readings(self, extractors: Mapping[str, Extractor]) -> list[Reading]:
        return [
            Reading(label, extractor, self.views[label.partition("@")[2]]) for label, extractor in extractors.items()
        ]

    def provenance(self) -> dict[str, Any]:
        """What the provenance of scores says about it."""
        if self.statistics is not None:
            s = self.statistics
            return {
                "name": self.name,
                "kind": s.kind,
                "sha256": s.sha256,
                "num_images": s.count,
                "resolution": s.resolution,
                **s.facts,
            }
        images = self.views[""]
        return {
            "name": self.name,
            "kind": "images",
            "sha256": images.sha256(),
            "num_images": len(images),
            **images.facts,
        }


def open_reference(
    protocol: Protocol, reference: str | Path | None, *, allow_skipped: bool = False
) -> Reference | None:
    """Opens the reference for samples of a protocol, and prints a line about the images of one that the user gave.

    Args:
        reference: images or a statistics file; None for the protocol's embedded reference.
        allow_skipped: as in `open_images`.

    Returns:
        None if no reference is given and the protocol has none embedded.

    Raises:
        ArgumentError, DataError: there is nothing, images cannot be used, or statistics are of another resolution.
    """
    where = protocol.embedded if reference is None else str(reference)
    if where is None:
        return None
    if _holds_statistics(Path(where)):
        statistics = read_statistics(Path(where))
        if None not in (protocol.size, statistics.resolution) and statistics.resolution != protocol.size:
            raise ArgumentError(
                f"reference {where}: has statistics of images of {statistics.resolution}x{statistics.resolution}, and "
                f"protocol {protocol.name!r} compares {protocol.size}x{protocol.size}; pass {protocol.reference}"
            )
        images = {} if statistics.images is None else {"": statistics.images}
        ours = statistics.kind == "fdistill"
        known = Path(where).name in protocol.reference_files and not ours
        if ours and statistics.facts.get("protocol") == protocol.name:
            known = protocol.reference_count is not None and statistics.count == protocol.reference_count
        return Reference(where, images, statistics, known)
    views = open_views(where, protocol.reference_views(), channels=protocol.channels, allow_skipped=allow_skipped)
    if reference is not None and views[""].account is not None:
        say(f"reference {where}", views[""].account.sentence())
    own = where == protocol.embedded
    known = own if protocol.embedded is not None else protocol.reference_count == len(views[""])
    return Reference(where, views, None, known)


def _holds_statistics(path: Path) -> bool:
    if path.suffix.lower() in (".pkl", ".pt") and path.is_file():
        return True
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return any(name == "mu" or name.endswith("/mu") for name in arrays.files)
    except ARCHIVE_ERRORS:
        return False


def _check_features(statistics: Statistics, extractors: Mapping[str, Extractor]) -> None:
    """Raises ArgumentError unless the statistics are of the features that these extractors compute."""
    recorded: Mapping[str, Any] = statistics.facts.get("extractors", {})
    for label, extractor in extractors.items():
        have = [name for name in statistics.moments if name.split(".")[0] == label]
        if not have:
            others = ", ".join(sorted(statistics.moments))
            raise ArgumentError(
                f"reference {statistics.name}: holds statistics of {others}, and none of {label}; pass the images, or "
                "statistics made with that extractor"
            )
        made_with: Mapping[str, Any] = recorded.get(label, {})
        for fact, ours in (("sha256", extractor.sha256), ("preparation", extractor.preparation)):
            if fact in made_with and made_with[fact] != ours:
                raise ArgumentError(
                    f"reference {statistics.name}: was made with another {label} "
                    f"({fact} {str(made_with[fact])[:60]!r}, here {ours[:60]!r}); make it again with fdistill reference"
                )

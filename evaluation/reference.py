"""What samples are measured against: images, or published statistics of them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.extractors import Extractor
from evaluation.features import Reading, Rows, cached_moments, cached_rows
from evaluation.images import Images, open_views
from evaluation.metrics.moments import Moments
from evaluation.protocols.protocol import Protocol
from evaluation.statistics_files import Reference, read_reference
from fdistill.base.errors import ArgumentError

_KEPT_ROWS = 100_000  # of more images than this only the moments are kept, which need no memory


class Against:
    """A reference: images, statistics, or, as ADM's files, statistics of all images and some of the images.

    Args:
        name: what messages call it.
        views: its images, as they are prepared for each view ("" is the protocol's own); none for statistics alone.
        statistics: None for images alone.
        is_protocols: whether it is a reference that the protocol names.
    """

    def __init__(self, name: str, views: Mapping[str, Images], statistics: Reference | None, is_protocols: bool):
        self.name, self.views, self.statistics, self.is_protocols = name, views, statistics, is_protocols
        self._rows: Rows = {} if statistics is None else dict(statistics.rows)
        self._moments: dict[str, Moments] = {}

    @property
    def has_rows(self) -> bool:
        """Whether metrics can be computed that need single images."""
        return bool(self.views) or bool(self._rows)

    @property
    def count(self) -> int | None:
        """Number of images that it stands for, where known."""
        return self.statistics.count if self.statistics is not None else len(self.views[""])

    @property
    def resolution(self) -> str | None:
        """Of its images as they are prepared, as "32x32", where known."""
        if self.statistics is None:
            return str(self.views[""].facts["resolution"])
        side = self.statistics.resolution
        return None if side is None else f"{side}x{side}"

    def moments(
        self, extractors: Mapping[str, Extractor], batch_size: int, device: torch.device
    ) -> Mapping[str, Moments]:
        """Of every output of the extractors, which are given by label; of their rows where these are known already.

        Raises:
            ArgumentError: statistics of other features.
        """
        if self.statistics is not None:
            _check_features(self.statistics, extractors)
            return self.statistics.moments
        missing = [r for r in self._readings(extractors) if not r.widths.keys() <= self._moments.keys()]
        if len(self.views[""]) <= _KEPT_ROWS:
            self.rows({reading.label: reading.extractor for reading in missing}, batch_size, device)
        streamed = [reading for reading in missing if not reading.widths.keys() <= self._rows.keys()]
        if streamed:
            self._moments |= cached_moments(streamed, batch_size=batch_size, device=device, describe="reference")
        names = [name for reading in missing if reading not in streamed for name in reading.widths]
        self._moments |= {name: Moments.of(self._rows[name]) for name in names}
        return self._moments

    def rows(self, extractors: Mapping[str, Extractor], batch_size: int, device: torch.device) -> Rows:
        """Features of its single images."""
        if self.statistics is not None and self._rows:
            _check_features(self.statistics, extractors)
        missing = {
            label: extractor
            for label, extractor in extractors.items()
            if not any(name.split(".")[0] == label for name in self._rows)
        }
        if missing and not self.views:
            raise ArgumentError(
                f"reference {self.name}: holds no images, and no rows of {', '.join(missing)}; pass the images "
                "themselves, or leave out the metrics that need them"
            )
        if missing:
            readings = self._readings(missing)
            self._rows |= cached_rows(readings, batch_size=batch_size, device=device, describe="reference")
        return self._rows

    def _readings(self, extractors: Mapping[str, Extractor]) -> list[Reading]:
        return [
            Reading(label, extractor, self.views[label.partition("@")[2]]) for label, extractor in extractors.items()
        ]

    def provenance(self) -> dict[str, Any]:
        """What it is, for a score's provenance."""
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


def open_against(protocol: Protocol, reference: str | Path | None) -> Against | None:
    """A reference for samples of this protocol: its own where none is given; None where it has none of its own.

    Raises:
        ArgumentError, DataError: nothing there, images that cannot be used, statistics of another resolution.
    """
    where = protocol.embedded if reference is None else str(reference)
    if where is None:
        return None
    if _holds_statistics(Path(where)):
        statistics = read_reference(Path(where))
        if None not in (protocol.size, statistics.resolution) and statistics.resolution != protocol.size:
            raise ArgumentError(
                f"reference {where}: of images of {statistics.resolution}x{statistics.resolution}; protocol "
                f"{protocol.name!r} compares {protocol.size}x{protocol.size}; pass {protocol.reference}"
            )
        images = {} if statistics.images is None else {"": statistics.images}
        ours = statistics.kind == "fdistill"
        known = Path(where).name in protocol.reference_files and not ours
        if ours and statistics.facts.get("protocol") == protocol.name:
            known = protocol.reference_count is not None and statistics.count == protocol.reference_count
        return Against(where, images, statistics, known)
    recipes = {"": (protocol.reference_recipe, protocol.size), **protocol.views}
    views = open_views(where, recipes, channels=protocol.channels)
    own = where == protocol.embedded
    known = own if protocol.embedded is not None else protocol.reference_count == len(views[""])
    return Against(where, views, None, known)


def _holds_statistics(path: Path) -> bool:
    if path.suffix in (".pkl", ".pt") and path.is_file():
        return True
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return any(name == "mu" or name.endswith("/mu") for name in arrays.files)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _check_features(statistics: Reference, extractors: Mapping[str, Extractor]) -> None:
    """Statistics must be of these very features."""
    recorded: Mapping[str, Any] = statistics.facts.get("extractors", {})
    for label, extractor in extractors.items():
        have = [name for name in statistics.moments if name.split(".")[0] == label]
        if not have:
            others = ", ".join(sorted(statistics.moments))
            raise ArgumentError(
                f"reference {statistics.name}: holds statistics of {others}, and none of {label}; pass the images, or "
                "a reference made with that extractor"
            )
        made_with: Mapping[str, Any] = recorded.get(label, {})
        for fact, ours in (("sha256", extractor.sha256), ("preparation", extractor.preparation)):
            if fact in made_with and made_with[fact] != ours:
                raise ArgumentError(
                    f"reference {statistics.name}: made with another {label} ({fact} {str(made_with[fact])[:60]!r}, "
                    f"here {ours[:60]!r}); make it again with fdistill reference"
                )

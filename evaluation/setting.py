"""How samples are measured: what the user chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from evaluation.extractors import Extractor
from evaluation.features import Extraction
from evaluation.protocols.protocol import Protocol
from evaluation.weights import Weights
from fdistill.base.errors import ArgumentError, did_you_mean


@dataclass(frozen=True)
class Setting:
    """How samples are measured.

    Attributes:
        protocol: what is measured, and how images are prepared.
        device: where networks run.
        metrics: names that the protocol knows; None for its default metrics, as far as samples and reference allow.
        batch_size: images at a time.
        weights: weights files that the user gave.
        replicates: bootstrap replicates behind the spread of Frechet distances; 0 for no spread.
        own: extractors of the user's own, by name.
        progress: whether progress bars are shown.
        pictures: whether metrics draw their pictures.

    Raises:
        ArgumentError: the protocol does not know a metric.
    """

    protocol: Protocol
    device: torch.device
    metrics: Sequence[str] | None = None
    batch_size: int = 64
    weights: Weights = field(default_factory=dict)
    replicates: int = 20
    own: Mapping[str, Extractor] = field(default_factory=dict)
    progress: bool = True
    pictures: bool = False

    def __post_init__(self) -> None:
        known = self.protocol.names()
        for name in self.metrics or ():
            if name not in known:
                raise ArgumentError(
                    f"metrics: protocol {self.protocol.name!r} has no {name!r}; {did_you_mean(name, known)}"
                )

    def extraction(self, describe: str) -> Extraction:
        """How images pass through extractors; `describe` is what the progress bar says."""
        return Extraction(self.batch_size, self.device, describe if self.progress else "")

"""`folder`: any images against any others of their size, as they are."""

from __future__ import annotations

from evaluation.metric import clip
from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

FOLDER = Protocol(
    name="folder",
    metrics=(*photograph_metrics(), clip("clip-l14")),
    default=("fid",),
    num_samples=None,
    reference="the images, or statistics, that are given",
)

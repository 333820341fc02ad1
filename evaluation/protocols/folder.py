"""`folder`: any images against any others of the same size, without resizing.

clip_own is the mean cosine by a CLIP model of your own, an open_clip folder that is given as --weights clip=FOLDER.
"""

from __future__ import annotations

from evaluation.metrics.clip_score import clip_cosine_metric, clip_metric
from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

FOLDER = Protocol(
    name="folder",
    metrics=(*photograph_metrics(), clip_metric("clip-l14"), clip_cosine_metric("clip_own", "clip")),
    default=("fid",),
    num_samples=None,
    reference="any images, or statistics",
)

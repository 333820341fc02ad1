"""`folder`: any images against any others of their size, as they are.

clip_own is the mean cosine by a CLIP model of the user's own, an open_clip folder: --weights clip=FOLDER.
"""

from __future__ import annotations

from evaluation.metric import clip, cosine
from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

FOLDER = Protocol(
    name="folder",
    metrics=(*photograph_metrics(), clip("clip-l14"), cosine("clip_own", "clip")),
    default=("fid",),
    num_samples=None,
    reference="any images, or statistics",
)

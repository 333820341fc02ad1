"""`imagenet64-edm2`: 50,000 samples against the 64x64 ImageNet of EDM2 (Karras et al. 2024, arXiv 2312.02696): halved
with BOX, then BICUBIC, then the central square, as ADM does. These are other images than in `imagenet64-fid50k`.
"""

from __future__ import annotations

from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

IMAGENET64_EDM2 = Protocol(
    name="imagenet64-edm2",
    metrics=photograph_metrics(),
    default=("fid",),
    num_samples=50_000,
    size=64,
    reference="EDM2's img64.pkl, or the 1,281,167 training images",
    reference_recipe="adm",
    reference_files=("img64.pkl",),
    reference_count=1_281_167,
    num_classes=1000,
    random_labels=True,
    facts={
        "published_as": "the least FID of several times 50,000 samples",
        "teachers": "EDM2 at 63 evaluations, unguided: S 1.58, M 1.43, L 1.33, XL 1.33",
    },
)

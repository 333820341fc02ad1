"""`imagenet64-fid50k`: 50,000 samples against the 64x64 ImageNet of EDM (Karras et al. 2022, arXiv 2206.00364): central
squares, resized once with LANCZOS. EDM2 and ADM have other images of that size, see `imagenet64-edm2`.
"""

from __future__ import annotations

from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

IMAGENET64_FID50K = Protocol(
    name="imagenet64-fid50k",
    metrics=photograph_metrics(),
    default=("fid", "recall"),
    num_samples=50_000,
    size=64,
    reference="EDM's imagenet-64x64.npz, or the 1,281,167 training images",
    reference_recipe="center-lanczos",
    reference_files=("imagenet-64x64.npz",),
    reference_count=1_281_167,
    num_classes=1000,
    random_labels=True,
    facts={
        "published_as": "the least FID of three times 50,000 samples",
        "teachers": "EDM (ADM's network, stochastic) at 511 evaluations: 1.36",
    },
)

"""`imagenet512-edm2`: 50,000 samples of 512x512 against the ImageNet of EDM2 (Karras et al. 2024, arXiv 2312.02696):
FID, and the Frechet distance in DINOv2's features. EDM2 publishes the two for different guidance, so one checkpoint
reaches only one of them.

EDM2 truncates the pixels of samples to whole numbers; here they are rounded.
"""

from __future__ import annotations

from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

IMAGENET512_EDM2 = Protocol(
    name="imagenet512-edm2",
    metrics=photograph_metrics(),
    default=("fid", "fd_dinov2"),
    num_samples=50_000,
    size=512,
    reference="EDM2's img512.pkl, or the 1,281,167 training images",
    reference_recipe="adm",
    reference_files=("img512.pkl",),
    reference_count=1_281_167,
    num_classes=1000,
    random_labels=True,
    facts={
        "published_as": "the least of several times 50,000 samples",
        "teachers": "EDM2 unguided, FID: XS 3.53, S 2.56, M 2.25, L 2.06, XL 1.96, XXL 1.91",
    },
)

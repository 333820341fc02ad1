"""`imagenet256-adm`: 50,000 samples of 256x256 as ADM measures them (Dhariwal and Nichol 2021, arXiv 2105.05233): FID
against the moments in VIRTUAL_imagenet256_labeled.npz, which are of all training images; precision and recall against
the 10,000 images in it; Inception Score over ten stretches of the samples in their order.

ADM computes distances for precision and recall in float16, which changes both by a few thousandths. Here they are
float32.
"""

from __future__ import annotations

from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

IMAGENET256_ADM = Protocol(
    name="imagenet256-adm",
    metrics=photograph_metrics(shuffled=False),
    default=("fid", "inception_score", "precision", "recall"),
    num_samples=50_000,
    size=256,
    reference="ADM's VIRTUAL_imagenet256_labeled.npz",
    reference_recipe="adm",
    reference_files=("VIRTUAL_imagenet256_labeled.npz",),
    reference_count=1_281_167,
    num_classes=1000,
    random_labels=True,
    facts={
        "published_as": "one set of 50,000 samples",
        "check": "ADM's admnet_guided_upsampled_imagenet256.npz: FID 3.943, Inception Score 215.84, precision 0.8265, "
        "recall 0.5309",
    },
)

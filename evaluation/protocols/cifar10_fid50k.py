"""`cifar10-fid50k`: 50,000 samples against the 50,000 training images, both 32x32 as they are, as EDM measures
(Karras et al. 2022, arXiv 2206.00364). To check a setup, measure EDM's networks: they reach 1.79 and 1.97, see `facts`.
"""

from __future__ import annotations

from evaluation.protocols.photographs import photograph_metrics
from evaluation.protocols.protocol import Protocol

CIFAR10_FID50K = Protocol(
    name="cifar10-fid50k",
    metrics=photograph_metrics(),
    default=("fid", "recall"),
    num_samples=50_000,
    size=32,
    reference="EDM's cifar10-32x32.npz, clean-fid's cifar10_legacy_tensorflow_train_32.npz, or the training images",
    reference_files=("cifar10-32x32.npz", "cifar10_legacy_tensorflow_train_32.npz"),
    reference_count=50_000,
    num_classes=10,
    random_labels=True,
    facts={
        "published_as": "the least FID of three times 50,000 samples",
        "teachers": "EDM (VP) at 35 evaluations: 1.79 class-conditional, 1.97 unconditional",
    },
)

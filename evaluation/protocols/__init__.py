"""Named protocols, one per file: what is measured, on how many samples, against what, by which extractor.

Imports no torch, so that results in files are compared without it.
"""

from __future__ import annotations

from evaluation.metrics.metric import Metric
from evaluation.protocols.cifar10_fid50k import CIFAR10_FID50K
from evaluation.protocols.coco10k_sdxl import COCO10K_SDXL
from evaluation.protocols.coco30k_dmd2 import COCO30K_DMD2
from evaluation.protocols.digit_pairs import DIGIT_PAIRS
from evaluation.protocols.digits import DIGITS
from evaluation.protocols.digits_t2i import DIGITS_T2I
from evaluation.protocols.few_step_t2i import FEW_STEP_T2I
from evaluation.protocols.folder import FOLDER
from evaluation.protocols.imagenet64_edm2 import IMAGENET64_EDM2
from evaluation.protocols.imagenet64_fid50k import IMAGENET64_FID50K
from evaluation.protocols.imagenet256_adm import IMAGENET256_ADM
from evaluation.protocols.imagenet512_edm2 import IMAGENET512_EDM2
from evaluation.protocols.protocol import Protocol
from fdistill.base.errors import ArgumentError, did_you_mean

__all__ = ["PROTOCOLS", "Protocol", "get_protocol", "higher_is_better"]

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        DIGITS,
        DIGITS_T2I,
        DIGIT_PAIRS,
        CIFAR10_FID50K,
        IMAGENET64_FID50K,
        IMAGENET64_EDM2,
        IMAGENET256_ADM,
        IMAGENET512_EDM2,
        COCO30K_DMD2,
        COCO10K_SDXL,
        FEW_STEP_T2I,
        FOLDER,
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of a name; raises ArgumentError that suggests the most similar name."""
    if name not in PROTOCOLS:
        raise ArgumentError(f"protocol: got {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def find_metric(score: str) -> Metric | None:
    """The metric that gives scores of this name, as "precision", in whichever protocol; None for an unknown name."""
    metrics = (metric for protocol in PROTOCOLS.values() for metric in protocol.metrics)
    return next((metric for metric in metrics if score in metric.outputs), None)


def higher_is_better(score: str) -> bool | None:
    """The direction of scores of this name; None for an unknown name, or a score that has no better direction."""
    metric = find_metric(score)
    return None if metric is None else metric.higher_is_better

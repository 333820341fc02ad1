"""Named protocols, a file each: what is measured, on how many samples, against what, with which extractor."""

from __future__ import annotations

from evaluation.protocols.cifar10_fid50k import CIFAR10_FID50K
from evaluation.protocols.coco10k_sdxl import COCO10K_SDXL
from evaluation.protocols.coco30k_dmd2 import COCO30K_DMD2
from evaluation.protocols.digits import DIGITS
from evaluation.protocols.digits_t2i import DIGITS_T2I
from evaluation.protocols.folder import FOLDER
from evaluation.protocols.imagenet64_edm2 import IMAGENET64_EDM2
from evaluation.protocols.imagenet64_fid50k import IMAGENET64_FID50K
from evaluation.protocols.imagenet256_adm import IMAGENET256_ADM
from evaluation.protocols.imagenet512_edm2 import IMAGENET512_EDM2
from evaluation.protocols.protocol import Protocol
from fdistill.base.errors import ArgumentError, did_you_mean

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        DIGITS,
        DIGITS_T2I,
        CIFAR10_FID50K,
        IMAGENET64_FID50K,
        IMAGENET64_EDM2,
        IMAGENET256_ADM,
        IMAGENET512_EDM2,
        COCO30K_DMD2,
        COCO10K_SDXL,
        FOLDER,
    )
}


def get_protocol(name: str) -> Protocol:
    """A protocol by name; raises ArgumentError with the nearest one."""
    if name not in PROTOCOLS:
        raise ArgumentError(f"protocol: got {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]

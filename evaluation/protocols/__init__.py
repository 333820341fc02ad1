"""Named protocols, a file each: what is measured, on how many samples, against what, with which extractor."""

from __future__ import annotations

from evaluation.protocols.digits import DIGITS
from evaluation.protocols.digits_t2i import DIGITS_T2I
from evaluation.protocols.protocol import Protocol
from fdistill.errors import ArgumentError, did_you_mean

PROTOCOLS: dict[str, Protocol] = {"digits": DIGITS, "digits-t2i": DIGITS_T2I}


def get_protocol(name: str) -> Protocol:
    """A protocol by name; raises ArgumentError with the nearest one."""
    if name not in PROTOCOLS:
        raise ArgumentError(f"protocol: got {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]

"""A classifier of the user's own, for the accuracy of class-conditional samples; `--classifier` of evaluate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from evaluation.extractors.extractor import Extractor, runner
from evaluation.metrics.accuracy import class_accuracy_metric
from evaluation.protocols.protocol import Protocol
from fdistill.base.errors import ArgumentError
from fdistill.base.functions import import_function
from fdistill.base.images import to_unit
from fdistill.base.state_dicts import tensors_sha256


def with_classifier(protocol: Protocol, name: str, device: torch.device) -> tuple[Protocol, Extractor]:
    """Adds class_accuracy by a classifier to a protocol.

    Args:
        name: "module:function". The function takes no arguments and returns a torch module that maps images float32
            [B, C, H, W] in [-1, 1] to logits [B, classes].

    Returns:
        (the protocol with class_accuracy, the extractor "classifier", which this metric reads).

    Raises:
        ArgumentError: the protocol has a classifier or no fixed image size, or the function cannot be imported or
            returns something else.
    """
    if "class_accuracy" in protocol.names():
        raise ArgumentError(f"classifier: protocol {protocol.name!r} has its own; leave it out")
    if protocol.size is None:
        raise ArgumentError(f"classifier: protocol {protocol.name!r} takes images of any size; choose one with a size")
    try:
        network = import_function(name)()
        if not isinstance(network, nn.Module):
            raise TypeError(f"the function returned a {type(network).__name__}")
        network = network.to(device).eval().requires_grad_(False)
        with torch.no_grad():
            logits = network(torch.zeros(1, protocol.channels, protocol.size, protocol.size, device=device))
    except Exception as error:  # the user's function may raise anything
        raise ArgumentError(
            f"classifier {name!r}: {type(error).__name__}: {error}; expected module:function that Python can import, "
            "which returns a torch module from images to logits"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ArgumentError(f"classifier {name!r}: its module returned no tensor [B, classes]")

    def compute(images: Tensor) -> dict[str, Tensor]:
        return {"logits": network(to_unit(images.to(device)))}

    extractor = Extractor(
        "classifier",
        {"logits": logits.shape[1]},
        runner(compute, device, (protocol.channels, protocol.size, protocol.size)),
        f"{name}, weights {tensors_sha256(dict(sorted(network.state_dict().items())))}, images in [-1, 1]",
        "",
        published=True,  # no published weights exist that they could differ from
    )
    extended = replace(
        protocol,
        metrics=(*protocol.metrics, class_accuracy_metric("classifier.logits")),
        default=(*protocol.default, "class_accuracy"),
    )
    return extended, extractor

"""What every protocol says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: (images uint8 [N, C, H, W], labels [N] or None, reference images uint8 [M, C, H, W], metric names) -> {metric: value}
Score = Callable[[Tensor, Tensor | None, Tensor, tuple[str, ...]], dict[str, float]]


@dataclass(frozen=True)
class Protocol:
    """A way to measure that two people would repeat alike.

    Attributes:
        num_samples: the full sample count; scores of any other count carry it in their name.
        sample_shape: (C, H, W) of images, as they are: nothing is resized.
        metrics: names it can compute.
        reference: name of the data set it measures against unless told otherwise.
        load_reference: that data set's images uint8 [M, C, H, W].
        score: computes the metrics.
        provenance: extractor, hash of its weights, resize and dtype.
        prompts: what each of the samples is asked to be; None for models that are told none.
    """

    name: str
    num_samples: int
    sample_shape: tuple[int, int, int]
    metrics: tuple[str, ...]
    needs_labels: tuple[str, ...]
    reference: str
    load_reference: Callable[[], Tensor]
    score: Score
    provenance: Callable[[], dict[str, Any]]
    prompts: Callable[[], list[str]] | None = None

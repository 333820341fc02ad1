"""The description of a metric, and the data it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from evaluation.metrics.score import Score

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as PILImage
    from torch import Tensor

    from evaluation.images import Images
    from evaluation.metrics.moments import Moments
    from evaluation.weights import Weights

__all__ = ["Measured", "Metric"]


@dataclass(frozen=True)
class Measured:
    """What a metric can be computed from. Features are named "extractor.output", as "inception.pool".

    Attributes:
        samples: features of the samples, float32 [N, D], by name.
        moments: mean and covariance of the reference's features, by name, for metrics with `against="moments"`.
        reference: features of the reference, float32 [M, D], by name, for metrics with `against="rows"`.
        images: the samples themselves, with their labels and prompts.
        reference_images: the images of the reference; None if only statistics of them are known.
        device: where networks run.
        weights: weights files of networks that a metric loads itself, by `Metric.files`.
        replicates: number of bootstrap replicates behind the spread of a Frechet distance; 0 for no spread.
        strata: class labels int64 [N], if each set of samples has the same number of each class; else None.
    """

    samples: Mapping[str, Tensor]
    moments: Mapping[str, Moments]
    reference: Mapping[str, Tensor]
    images: Images
    reference_images: Images | None
    device: torch.device
    weights: Weights
    replicates: int = 20
    strata: Tensor | None = None

    def on_device(self, features: str) -> tuple[Tensor, Tensor]:
        """(features of the samples, of the reference) on the device for distances between all of them.

        Distances are computed in float64, which MPS does not have: there the CPU takes its place.
        """
        device = "cpu" if self.device.type == "mps" else self.device
        return self.samples[features].to(device), self.reference[features].to(device)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to measure images, with everything that the evaluation must know to run it.

    Attributes:
        name: what --metrics calls it.
        outputs: names of the numbers that it gives.
        higher_is_better: direction of these numbers; None if neither high nor low values are better.
        features: features of the samples that it reads, as "extractor.output"; with `against` set, features of the
            reference too.
        compute: gives {name of the number: score} for every name in `outputs`.
        min_samples: from the number D of features, the least number of samples, and of the reference's images if it
            reads those.
        against: what it reads of the reference: "moments" (mean and covariance), "rows" (features of every image), or
            None.
        needs: "labels" or "prompts", if the samples must have them; "pairs", if two of them must have the same.
        clip: (CLIP model, prefix of each prompt), if it compares images with their prompts.
        picture: draws what can be looked at beside the number; returns None if there is nothing to draw.
        files: weights that it loads itself, as keys of `evaluation.weights.PUBLISHED`.
    """

    name: str
    outputs: tuple[str, ...]
    higher_is_better: bool | None
    compute: Callable[[Measured], dict[str, Score]]
    features: tuple[str, ...] = ()
    min_samples: Callable[[int], int] = lambda width: 1
    against: Literal["moments", "rows"] | None = None
    needs: Literal["labels", "prompts", "pairs"] | None = None
    clip: tuple[str, str] | None = None
    picture: Callable[[Measured], PILImage | None] | None = None
    files: tuple[str, ...] = ()

"""What a protocol may measure: each metric with the features it reads, and the names of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from evaluation.images import Images
from evaluation.metrics.accuracy import accuracy
from evaluation.metrics.clip_score import clip_scores
from evaluation.metrics.density_coverage import density_coverage
from evaluation.metrics.diversity import mean_of_groups, pairs_within_groups
from evaluation.metrics.fid_infinity import frechet_infinity
from evaluation.metrics.frechet import frechet_score
from evaluation.metrics.inception_score import inception_score
from evaluation.metrics.kernel_distance import kernel_distance
from evaluation.metrics.memorisation import authenticity, nearest
from evaluation.metrics.moments import Moments
from evaluation.metrics.precision_recall import precision_recall
from evaluation.metrics.score import Score
from evaluation.weights import Weights
from fdistill.base.errors import ArgumentError
from fdistill.base.images import grid

_SHOWN = 10
_PAIRS, _GROUPS = 10, 100  # image pairs for each class or prompt, and how many of those, for diversity


@dataclass(frozen=True)
class Measured:
    """What metrics are computed from.

    Attributes:
        samples: {"extractor.output": float32 [N, D]} of the samples.
        moments, reference: the same names' moments, and rows, of the reference.
        images, reference_images: the samples, and the reference where it has images, by index.
        replicates: of the bootstrap.
        strata: the samples' labels, where every set of samples has as many of each; else None.
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
        """(rows of the samples, of the reference), where distances between all of them are computed: in float64, which
        MPS has not."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return self.samples[features].to(device), self.reference[features].to(device)


@dataclass(frozen=True)
class Metric:
    """One way to measure.

    Attributes:
        name: as in --metrics.
        outputs: the names of its numbers.
        features: outputs of extractors that it reads, of the samples and, as `against` says, of the reference.
        least: how many samples it needs, and how many images of the reference, given the number of features.
        against: what of the reference it needs: its moments, its rows (so its images), or nothing.
        needs: what of the samples it needs beside: "labels" or "prompts".
        picture: what to look at beside the number, if anything.
        clip: name of the CLIP model whose text encoder it needs, and what comes before each prompt.
        files: further weights that it loads, keys of `evaluation.weights.PUBLISHED`.
    """

    name: str
    outputs: tuple[str, ...]
    features: tuple[str, ...]
    compute: Callable[[Measured], dict[str, Score]]
    least: Callable[[int], int] = lambda width: 1
    against: Literal["moments", "rows"] | None = None
    needs: Literal["labels", "prompts"] | None = None
    clip: tuple[str, str] | None = None
    picture: Callable[[Measured], PILImage | None] | None = None
    files: tuple[str, ...] = ()


def frechet(name: str, features: str) -> Metric:
    """Frechet distance in these features; "fid" is the name of that in Inception's pool, and of no other."""

    def compute(at: Measured) -> dict[str, Score]:
        rows, moments = at.samples[features], at.moments[features]
        return {name: frechet_score(rows, moments, replicates=at.replicates, strata=at.strata)}

    return Metric(name, (name,), (features,), compute, lambda width: width + 1, "moments")


def infinity(name: str, features: str) -> Metric:
    """The same distance, extrapolated to infinitely many samples."""

    def compute(at: Measured) -> dict[str, Score]:
        return {name: frechet_infinity(at.samples[features], at.moments[features])}

    return Metric(name, (name,), (features,), compute, lambda width: 4 * width, "moments")


def kid(name: str, features: str) -> Metric:
    def compute(at: Measured) -> dict[str, Score]:
        return {name: kernel_distance(at.samples[features], at.reference[features])}

    return Metric(name, (name,), (features,), compute, lambda width: 1000, "rows")


def inception(features: str, *, shuffled: bool = True) -> Metric:
    def compute(at: Measured) -> dict[str, Score]:
        return {"inception_score": inception_score(at.samples[features], shuffled=shuffled)}

    return Metric("inception_score", ("inception_score",), (features,), compute, lambda width: 10)


def precision_and_recall(features: str) -> Metric:
    def compute(at: Measured) -> dict[str, Score]:
        return dict(zip(("precision", "recall"), precision_recall(*at.on_device(features)), strict=True))

    return Metric("precision_recall", ("precision", "recall"), (features,), compute, lambda width: 4, "rows")


def density_and_coverage(features: str) -> Metric:
    def compute(at: Measured) -> dict[str, Score]:
        return dict(zip(("density", "coverage"), density_coverage(*at.on_device(features)), strict=True))

    return Metric("density_coverage", ("density", "coverage"), (features,), compute, lambda width: 6, "rows")


def memorisation(features: str) -> Metric:
    """Whether samples are copies; the reference must be the training images."""

    def compute(at: Measured) -> dict[str, Score]:
        return {"authenticity": authenticity(*at.on_device(features))}

    def picture(at: Measured) -> PILImage | None:
        """The samples that are nearest to a training image, each above it."""
        if at.reference_images is None:
            return None
        distances, neighbours = nearest(*at.on_device(features))
        closest = distances.argsort()[:_SHOWN]
        above, below = at.images.read(closest.tolist()), at.reference_images.read(neighbours[closest].tolist())
        return grid(torch.cat([above, below]), columns=len(closest))

    return Metric("authenticity", ("authenticity",), (features,), compute, lambda width: 2, "rows", picture=picture)


def class_accuracy(logits: str) -> Metric:
    """Share of samples that the extractor's classifier puts into the class they were asked to be of."""

    def compute(at: Measured) -> dict[str, Score]:
        assert at.images.labels is not None
        return {"class_accuracy": accuracy(at.samples[logits], at.images.labels)}

    return Metric("class_accuracy", ("class_accuracy",), (logits,), compute, needs="labels")


def clip(model: str, prefix: str = "") -> Metric:
    """Likeness of each image and its prompt: the mean cosine, and the two other numbers that go by this name."""
    image, text = f"{model}.image", f"{model}.text"

    def compute(at: Measured) -> dict[str, Score]:
        return clip_scores(at.samples[image], at.samples[text])

    outputs = ("clip_cosine", "clip_x100", "clipscore")
    return Metric("clip", outputs, (image,), compute, needs="prompts", clip=(model, prefix))


def cosine(name: str, model: str) -> Metric:
    """The mean cosine alone, under a name of its own, as by this model it is no CLIP score."""
    every = clip(model)
    return replace(every, name=name, outputs=(name,), compute=lambda at: {name: every.compute(at)["clip_cosine"]})


def lpips_diversity() -> Metric:
    """Mean LPIPS between images of one class or one prompt: 10 pairs of each, of at most 100 of them, evenly chosen."""

    def compute(at: Measured) -> dict[str, Score]:
        from evaluation.extractors.lpips import open_lpips

        pairs, groups = _diversity_pairs(at)
        network = open_lpips(at.device, at.weights)
        distances = [
            network(at.images.read([i for i, _ in part]), at.images.read([j for _, j in part])).cpu()
            for part in (pairs[first : first + 32] for first in range(0, len(pairs), 32))
        ]
        return {"lpips_diversity": mean_of_groups(torch.cat(distances), groups)}

    return Metric("lpips_diversity", ("lpips_diversity",), (), compute, files=("vgg16", "lpips"))


def feature_diversity(name: str, features: str) -> Metric:
    """The same, with distances between features in place of LPIPS."""

    def compute(at: Measured) -> dict[str, Score]:
        pairs, groups = _diversity_pairs(at)
        first, second = (at.samples[features][[pair[side] for pair in pairs]].double() for side in (0, 1))
        return {name: mean_of_groups((first - second).norm(dim=1), groups)}

    return Metric(name, (name,), (features,), compute)


def _diversity_pairs(at: Measured) -> tuple[list[tuple[int, int]], list[Hashable]]:
    """(pairs of images, the class or prompt of each pair)."""
    labels, prompts = at.images.labels, at.images.prompts
    told: Sequence[Hashable] = ["all"] * len(at.images) if prompts is None else prompts
    if labels is not None:
        told = labels.tolist()
    pairs = pairs_within_groups(told, pairs_per_group=_PAIRS, seed=0)
    found = list(dict.fromkeys(told[i] for i, _ in pairs))
    if not found:
        raise ArgumentError(
            f"diversity: no two of {at.images.name}'s images have the same class or prompt; give prompts that each are "
            "drawn several times, as 10 prompts for 100 images"
        )
    chosen = set(found[:: -(-len(found) // _GROUPS)])
    pairs = [pair for pair in pairs if told[pair[0]] in chosen]
    return pairs, [told[i] for i, _ in pairs]

"""Which metrics are computed, and the networks that they need: those that the user named, or the protocol's default
ones as far as samples, reference and weights allow.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.extractors import Extractor, open_extractor, open_text_image_model
from evaluation.extractors.clip import ClipModel
from evaluation.images import Images
from evaluation.metrics.diversity import groups_of
from evaluation.metrics.metric import Metric
from evaluation.protocols.protocol import Protocol
from evaluation.reference import Reference
from evaluation.setting import Setting
from evaluation.weights import PUBLISHED, MissingWeightsError, find_weights
from fdistill.base.errors import ArgumentError


@dataclass(frozen=True)
class Networks:
    """Networks that metrics need.

    Attributes:
        extractors: by label, the extractor's name and "@view" for a view other than the protocol's own.
        clips: CLIP models whose text encoders are needed, by label.
        prefixes: what they put before each prompt, by label.
        files: weights that metrics load themselves, as keys of `evaluation.weights.PUBLISHED`.
    """

    extractors: dict[str, Extractor]
    clips: dict[str, ClipModel]
    prefixes: dict[str, str]
    files: dict[str, Path]

    def open(self, metric: Metric, setting: Setting) -> None:
        """Adds what a metric needs. All processes must call this together, as one of them may have to download."""
        if metric.clip is not None and metric.clip[0] not in self.clips:
            label = metric.clip[0]
            self.clips[label] = open_text_image_model(_extractor_of(label), setting.device, setting.weights)
            self.extractors[label] = self.clips[label].extractor
        for label in _labels(metric):
            if label not in self.extractors:
                self.extractors[label] = _open(label, setting)
        for name in metric.files:
            if name not in self.files:
                self.files[name] = find_weights(name, PUBLISHED[name], setting.weights)

    def of(self, metrics: Sequence[Metric]) -> Networks:
        """Those that these metrics need."""
        labels = dict.fromkeys(label for metric in metrics for label in _labels(metric))
        prefixes = {metric.clip[0]: metric.clip[1] for metric in metrics if metric.clip is not None}
        return Networks(
            {label: self.extractors[label] for label in labels},
            {label: self.clips[label] for label in prefixes},
            prefixes,
            {name: self.files[name] for metric in metrics for name in metric.files},
        )


def choose(images: Images, reference: Reference | None, setting: Setting) -> tuple[list[str], Networks]:
    """Names of the metrics to compute, and their networks. What is left out is said, with a warning for each.

    Raises:
        ArgumentError: a metric that the user named is not possible, or no default one is.
        CheckpointError: weights of a metric that the user named, or of all default ones, are not found; weights that
            are there are unreadable, or of another network.
    """
    known, opened = setting.protocol.names(), Networks({}, {}, {}, {})
    chosen: list[str] = []
    left_out: dict[str, Exception] = {}
    for name in setting.metrics or setting.protocol.default:
        refusal = _refusal(name, opened, images, reference, setting)
        if refusal is None:
            chosen.append(name)
        elif setting.metrics:
            raise refusal
        else:
            left_out[name] = refusal
    if not chosen:
        raise next(iter(left_out.values()))
    for name, refusal in left_out.items():
        missing = isinstance(refusal, MissingWeightsError)
        said = f"{name} ({refusal})" if missing else str(refusal).removeprefix("metrics: ")
        warnings.warn(f"left out: {said}", stacklevel=3)
    return chosen, opened.of([known[name] for name in chosen])


def _refusal(
    name: str, opened: Networks, images: Images, reference: Reference | None, setting: Setting
) -> Exception | None:
    """The error with which a metric is refused; None if it is possible, and its networks are then opened.

    Raises:
        ArgumentError, CheckpointError: there are too few images, or weights are missing, by a protocol that says how
            many images there are: a half of its scores would pass for the whole.
    """
    metric, strict = setting.protocol.names()[name], setting.protocol.num_samples is not None
    said = _problem(metric, images, reference, setting.protocol)
    if said is None:
        try:
            opened.open(metric, setting)
        except MissingWeightsError as error:
            if strict:
                raise
            return error
        said = _too_few(metric, opened.extractors, len(images), reference)
        if said is not None and strict:
            raise ArgumentError(f"metrics: {name} {said}")
    return None if said is None else ArgumentError(f"metrics: {name} {said}")


def _labels(metric: Metric) -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in metric.features))


def _extractor_of(label: str) -> str:
    """inception-clean of "inception-clean@patch"."""
    return label.partition("@")[0]


def _open(label: str, setting: Setting) -> Extractor:
    name = _extractor_of(label)
    return setting.own[name] if name in setting.own else open_extractor(name, setting.device, setting.weights)


def _problem(metric: Metric, images: Images, reference: Reference | None, protocol: Protocol) -> str | None:
    """Why a metric cannot be computed, as the end of a sentence that begins with its name; None if it can."""
    if metric.against is not None and reference is None:
        return f"needs a reference (--reference): {protocol.reference}"
    if metric.against == "rows" and reference is not None and not reference.has_rows:
        return f"needs the reference's images, and {reference.name} holds statistics alone; pass the images"
    if metric.needs == "labels" and images.labels is None:
        return f"needs class labels, and {images.name} has none in a manifest.json, in folder names or in an array"
    if metric.needs == "prompts" and images.prompts is None:
        if protocol.prompts is not None:
            return (
                f"needs images of this protocol's prompts, and {images.name} has no prompts; evaluate the student or "
                f"teacher itself (fdistill evaluate CHECKPOINT --protocol {protocol.name}), which makes them"
            )
        return f"needs prompts, and {images.name} has none; pass a file with one for each image (--prompts)"
    if metric.needs == "pairs" and len(set(groups_of(images))) == len(images):
        return (
            f"needs several images of one class or prompt, and no two of {images.name} have the same; generate more "
            "images than there are prompts, such as 100 images of 10 prompts"
        )
    return None


def _too_few(
    metric: Metric, extractors: Mapping[str, Extractor], count: int, reference: Reference | None
) -> str | None:
    """As `_problem`, if there are too few samples or images of the reference; before features are extracted."""
    for key in metric.features:
        extractor, output = key.split(".")
        width = extractors[extractor].outputs[output]
        have = {"samples": count}
        if metric.against is not None and reference is not None and reference.count is not None:
            have["reference images"] = reference.count
        for what, number in have.items():
            moments = what == "reference images" and metric.against == "moments"
            least = width + 1 if moments else metric.min_samples(width)
            if number < least:
                why = f", as the covariance of {width} features is singular" if least == width + 1 else ""
                return f"of {number} {what} is refused{why}; expected at least {least}, or other metrics"
    return None

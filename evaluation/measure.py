"""Samples measured by a protocol: features are extracted once for all metrics; a score's name says what it is."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image as PILImage

from evaluation.extractors import Extractor, open_extractor
from evaluation.extractors.clip import ClipModel, open_clip_model
from evaluation.features import Reading, Rows, cached_rows, extract_texts
from evaluation.generated import GeneratedImages
from evaluation.images import Images
from evaluation.metric import Measured, Metric
from evaluation.metrics.moments import Moments
from evaluation.metrics.score import Score
from evaluation.protocols.protocol import Protocol
from evaluation.reference import Against
from evaluation.weights import PUBLISHED, Weights, file_sha256, find_weights, is_published
from fdistill.base.distributed import from_main_process
from fdistill.base.errors import ArgumentError, did_you_mean

_PER_CLASS = 20  # so many samples a class, drawn at random, leave none of 1,000 classes out but once in 500,000 times


@dataclass(frozen=True)
class Setting:
    """How samples are measured.

    Attributes:
        metrics: names out of the protocol's; None for those it is known for, as far as samples and reference allow.
        weights: where files of published weights are.
        replicates: of the bootstrap that gives distances their spread; 0 for none.
        own: extractors of the user's own, by name.
        progress: whether bars are shown.
        pictures: whether metrics draw what there is to see.
    """

    protocol: Protocol
    device: torch.device
    metrics: Sequence[str] | None = None
    batch_size: int = 64
    weights: Weights = field(default_factory=dict)
    replicates: int = 20
    own: Mapping[str, Extractor] = field(default_factory=dict)
    progress: bool = True
    pictures: bool = False

    def __post_init__(self) -> None:
        known = self.protocol.names()
        for name in self.metrics or ():
            if name not in known:
                raise ArgumentError(
                    f"metrics: protocol {self.protocol.name!r} has no {name!r}; {did_you_mean(name, known)}"
                )


@dataclass(frozen=True)
class Measurement:
    """Scores by their full names, what there is to know of how they were made, and pictures by metric, which the main
    process has."""

    scores: dict[str, Score]
    provenance: dict[str, Any]
    pictures: dict[str, PILImage]


def measure(views: Mapping[str, Images], against: Against | None, setting: Setting) -> Measurement:
    """Scores of images; computed by the main process from the features of all, returned by each.

    Args:
        views: the samples, as the protocol prepares them ("") and as its other views want them.

    Raises:
        ArgumentError: metrics that these samples or this reference do not allow.
    """
    protocol, images = setting.protocol, views[""]
    count = len(images)
    chosen = _chosen(images, against, setting)
    metrics = list(dict.fromkeys(protocol.names()[name] for name in chosen))
    prefixes = {metric.clip[0]: metric.clip[1] for metric in metrics if metric.clip is not None}
    labels = dict.fromkeys(key.split(".")[0] for metric in metrics for key in metric.features)
    clips = {label: open_clip_model(_network(label), setting.device, setting.weights) for label in prefixes}
    extractors = {label: clips[label].extractor if label in clips else _open(label, setting) for label in labels}
    _check_counts(metrics, extractors, count, against)
    # Found by all processes together, as one of them may have to download; only the main one will load them.
    files = {name: find_weights(name, PUBLISHED[name], setting.weights) for m in metrics for name in m.files}
    networks = _networks(extractors, files)
    if protocol.num_samples is not None and count < protocol.num_samples:
        warnings.warn(
            f"{images.name}: {count} images, and protocol {protocol.name!r} wants {protocol.num_samples}; scores carry "
            "the count in their names, and are not those that papers give",
            stacklevel=2,
        )
    readings = [Reading(label, e, views[label.partition("@")[2]]) for label, e in extractors.items()]
    _check_resolution(images, against, protocol)
    # Before hours are spent on samples: a reference may turn out not to be of these features.
    moments, reference_rows = _reference(metrics, extractors, against, setting)
    texts = _texts(clips, prefixes, images.prompts or [], setting)
    how: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "device": setting.device,
        "describe": "samples" if setting.progress else "",
    }
    with images.measured(setting.batch_size) if isinstance(images, GeneratedImages) else nullcontext():
        _check_resolution(images, against, protocol)
        rows = texts | (cached_rows(readings, **how) if readings else {})
        measured = Measured(
            rows,
            moments,
            reference_rows,
            images=images,
            reference_images=None if against is None else against.views.get(""),
            device=setting.device,
            weights={**setting.weights, **files},
            replicates=setting.replicates,
            strata=None if protocol.random_labels else images.labels,
        )
        pictures: dict[str, PILImage] = {}

        def compute() -> dict[str, Score]:
            for metric in metrics:
                picture = metric.picture(measured) if setting.pictures and metric.picture is not None else None
                pictures.update({} if picture is None else {metric.name: picture})
            return {name: score for metric in metrics for name, score in metric.compute(measured).items()}

        scores = from_main_process(compute)
    _warn_of_lossy(images)
    named = {}
    for name, score in scores.items():
        metric = protocol.names()[name]
        if name in chosen or metric.name in chosen:
            named[_full_name(name, metric, protocol, images, against, networks)] = score
    return Measurement(named, _provenance(images, against, networks, setting), pictures)


def _texts(
    clips: Mapping[str, ClipModel], prefixes: Mapping[str, str], prompts: Sequence[str], setting: Setting
) -> Rows:
    """{"label.text": features of the prompts, behind the metric's prefix}."""
    describe = "prompts" if setting.progress else ""
    return {
        f"{label}.text": extract_texts(
            prompts, partial(clips[label].encode_prompts, prefix=prefix), device=setting.device, describe=describe
        )
        for label, prefix in prefixes.items()
    }


def _network(label: str) -> str:
    return label.partition("@")[0]


def _open(label: str, setting: Setting) -> Extractor:
    name = _network(label)
    return setting.own[name] if name in setting.own else open_extractor(name, setting.device, setting.weights)


def _networks(extractors: Mapping[str, Extractor], files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What provenance says of each network."""
    known: dict[str, dict[str, Any]] = {
        label: {"sha256": e.sha256, "published": e.published, "preparation": e.preparation}
        for label, e in extractors.items()
    }
    for name, path in files.items():
        sha256 = file_sha256(path)
        known[name] = {"sha256": sha256, "published": is_published(path, sha256, PUBLISHED[name])}
    return known


def _full_name(
    name: str,
    metric: Metric,
    protocol: Protocol,
    images: Images,
    against: Against | None,
    networks: Mapping[str, Mapping[str, Any]],
) -> str:
    """A score's name, which says what of the protocol was not kept to."""
    count = len(images)
    whole = name if count == protocol.num_samples else f"{name}@{count}"
    if images.labels is not None and protocol.num_classes is not None and count >= _PER_CLASS * protocol.num_classes:
        there = len(images.labels.unique())
        whole += f" ({there} of {protocol.num_classes} classes)" if there < protocol.num_classes else ""
    if metric.against is not None and against is not None and not against.is_protocols:
        whole += f" vs {Path(against.name).name}"
    used = dict.fromkeys([*(key.split(".")[0] for key in metric.features), *metric.files])
    other = [networks[name]["sha256"][:8] for name in used if not networks[name]["published"]]
    return whole + (f" (other weights {', '.join(other)})" if other else "")


def _warn_of_lossy(images: Images) -> None:
    lossy = images.facts.get("lossy_files", 0)
    if lossy:
        warnings.warn(
            f"{images.name}: {lossy} of {len(images)} samples are lossy files (JPEG, WebP), whose artefacts a network "
            "sees; scores are of those files, not of what was generated: write PNG",
            stacklevel=3,
        )


def _chosen(images: Images, against: Against | None, setting: Setting) -> list[str]:
    """Names of what is measured; those asked for must be possible, of the protocol's own the possible ones are."""
    known, chosen, left_out = setting.protocol.names(), [], {}
    for name in setting.metrics or setting.protocol.default:
        metric = known[name]
        problem = _problem(metric, images, against, setting.protocol)
        if problem is None:
            chosen.append(name)
        elif setting.metrics:
            raise ArgumentError(f"metrics: {name} {problem}")
        else:
            left_out[name] = problem
    if not chosen:
        name = setting.protocol.default[0]
        raise ArgumentError(f"metrics: {name} {_problem(known[name], images, against, setting.protocol)}")
    for name, problem in left_out.items():
        warnings.warn(f"left out: {name} {problem}", stacklevel=3)
    return chosen


def _problem(metric: Metric, images: Images, against: Against | None, protocol: Protocol) -> str | None:
    if metric.against is not None and against is None:
        return f"needs a reference (--reference): {protocol.reference}"
    if metric.against == "rows" and against is not None and not against.has_rows:
        return f"needs the reference's images, and {against.name} holds statistics alone; pass the images"
    if metric.needs == "labels" and images.labels is None:
        return f"needs labels, and {images.name} has none: no manifest.json, folders or array that tells them"
    if metric.needs == "prompts" and images.prompts is None:
        return f"needs prompts, and {images.name} has none; pass a file with one for each image"
    return None


def _check_counts(
    metrics: Sequence[Metric], extractors: Mapping[str, Extractor], count: int, against: Against | None
) -> None:
    """Before hours are spent."""
    for metric in metrics:
        for key in metric.features:
            extractor, output = key.split(".")
            width = extractors[extractor].outputs[output]
            have = {"samples": count}
            if metric.against is not None and against is not None and against.count is not None:
                have["reference images"] = against.count
            for what, number in have.items():
                least = width + 1 if what != "samples" and metric.against == "moments" else metric.least(width)
                if number < least:
                    why = f", as the covariance of {width} features is singular" if least == width + 1 else ""
                    raise ArgumentError(
                        f"metrics: {metric.name} of {number} {what} is refused{why}; expected at least {least}, or "
                        "other metrics"
                    )


def _check_resolution(images: Images, against: Against | None, protocol: Protocol) -> None:
    """A network's features of 32x32 and of 64x64 do not compare; a protocol of one size has checked it already."""
    if protocol.size is not None or against is None or against.resolution is None:
        return
    resolution = images.facts.get("resolution", against.resolution)  # of samples not known before the first is made
    if resolution != against.resolution:
        raise ArgumentError(
            f"reference {against.name}: of images of {against.resolution}, and those of {images.name} are "
            f"{resolution}; expected both of one size"
        )


def _reference(
    metrics: Sequence[Metric], extractors: Mapping[str, Extractor], against: Against | None, setting: Setting
) -> tuple[Mapping[str, Moments], Rows]:
    """(moments, rows) of what the metrics need of the reference."""

    def needed(kind: str) -> dict[str, Extractor]:
        keys = (key for metric in metrics if metric.against == kind for key in metric.features)
        return {label: extractors[label] for label in dict.fromkeys(key.split(".")[0] for key in keys)}

    if against is None:
        return {}, {}
    how = (setting.batch_size, setting.device)
    wanted = {kind: needed(kind) for kind in ("rows", "moments")}
    rows = against.rows(wanted["rows"], *how) if wanted["rows"] else {}  # first, as moments can be made of them
    return against.moments(wanted["moments"], *how) if wanted["moments"] else {}, rows


def _provenance(
    images: Images, against: Against | None, networks: Mapping[str, Mapping[str, Any]], setting: Setting
) -> dict[str, Any]:
    protocol = setting.protocol
    prompts = None if images.prompts is None else "\n".join(images.prompts)
    labels = None if images.labels is None else " ".join(str(label) for label in images.labels.tolist())
    return {
        "protocol": protocol.name,
        "num_samples": len(images),
        "protocol_num_samples": protocol.num_samples,
        "samples": images.name,
        "samples_sha256": images.sha256(),
        **({} if prompts is None else {"prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest()}),
        **({} if labels is None else {"labels_sha256": hashlib.sha256(labels.encode()).hexdigest()}),
        "recipe": protocol.recipe,
        "reference": None if against is None else against.provenance(),
        "extractors": networks,
        "dtype": "float32 features, float64 statistics; distances for precision and recall in float32",
        "batch_size": setting.batch_size,
        **protocol.facts,
        **images.facts,
        **_told_by_manifest(images.facts),
    }


def _told_by_manifest(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's manifest says, under the names that generated samples have it by."""
    found: dict[str, Any] = {}
    if "seed" in facts:
        found["seeds"] = [facts["seed"]]
    if facts.get("images_per_second"):
        found["seconds_per_image"] = 1 / facts["images_per_second"]
    return found

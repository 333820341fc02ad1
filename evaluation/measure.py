"""Scores samples by a protocol. Features are extracted once for all metrics; a score's name says how it departs from
the protocol.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image as PILImage

from evaluation.choice import Networks, choose
from evaluation.extractors import Extractor
from evaluation.features import Reading, Rows, cached_rows, extract_texts
from evaluation.generated import GeneratedImages
from evaluation.images import Images
from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.moments import Moments
from evaluation.metrics.score import Score
from evaluation.protocols.protocol import Protocol
from evaluation.reference import Reference
from evaluation.setting import Setting
from evaluation.weights import PUBLISHED, is_published
from fdistill.base.distributed import from_main_process
from fdistill.base.errors import ArgumentError
from fdistill.base.files import sha256_of_files

_PER_CLASS = 20  # of 1,000 classes drawn at random, this many samples a class leave one out once in 500,000 sets


@dataclass(frozen=True)
class Measurement:
    """What `measure` returns.

    Attributes:
        scores: by full name, as "fid@5000 vs photos".
        provenance: what is needed to repeat them.
        pictures: by metric; on the main process alone.
    """

    scores: dict[str, Score]
    provenance: dict[str, Any]
    pictures: dict[str, PILImage]


def measure(views: Mapping[str, Images], reference: Reference | None, setting: Setting) -> Measurement:
    """Scores of samples. All processes extract features, the main process computes, and each returns the same scores.

    Args:
        views: the samples in the views of the protocol, "" being its own view.
        reference: None if there is none; then metrics that need one cannot be computed.

    Raises:
        ArgumentError, CheckpointError: as `choose`.
    """
    protocol, images = setting.protocol, views[""]
    chosen, networks = choose(images, reference, setting)
    metrics = list(dict.fromkeys(protocol.names()[name] for name in chosen))
    facts = _facts_of_networks(networks)
    _warn_of_count(images, protocol)
    _check_resolution(images, reference, protocol)
    # The reference first: it may turn out to be of other features, and samples take hours.
    moments, reference_rows = _features_of_reference(metrics, networks.extractors, reference, setting)
    texts = _features_of_prompts(networks, images.prompts or [], setting)
    readings = [Reading(label, e, views[label.partition("@")[2]]) for label, e in networks.extractors.items()]
    with images.measured(setting.batch_size) if isinstance(images, GeneratedImages) else nullcontext():
        _check_resolution(images, reference, protocol)
        measured = Measured(
            texts | (cached_rows(readings, setting.extraction("samples")) if readings else {}),
            moments,
            reference_rows,
            images=images,
            reference_images=None if reference is None else reference.views.get(""),
            device=setting.device,
            weights={**setting.weights, **networks.files},
            replicates=setting.replicates,
            strata=None if protocol.random_labels else images.labels,
        )
        scores, pictures = _computed(metrics, measured, draw=setting.pictures)
    _warn_of_some(images)
    named = {}
    for name, score in scores.items():
        metric = protocol.names()[name]
        if name in chosen or metric.name in chosen:
            named[_full_name(name, metric, protocol, images, reference, facts)] = score
    return Measurement(named, _provenance(images, reference, facts, setting), pictures)


def _computed(
    metrics: Sequence[Metric], measured: Measured, *, draw: bool
) -> tuple[dict[str, Score], dict[str, PILImage]]:
    """(scores, the same on all processes; pictures by metric, on the main process)."""
    pictures: dict[str, PILImage] = {}

    def compute() -> dict[str, Score]:
        for metric in metrics:
            picture = metric.picture(measured) if draw and metric.picture is not None else None
            pictures.update({} if picture is None else {metric.name: picture})
        return {name: score for metric in metrics for name, score in metric.compute(measured).items()}

    return from_main_process(compute), pictures


def _features_of_prompts(networks: Networks, prompts: Sequence[str], setting: Setting) -> Rows:
    """{"label.text": features of the prompts, each behind the metric's prefix}."""
    describe = "prompts" if setting.progress else ""
    return {
        f"{label}.text": extract_texts(
            prompts,
            partial(networks.clips[label].encode_prompts, prefix=prefix),
            device=setting.device,
            describe=describe,
        )
        for label, prefix in networks.prefixes.items()
    }


def _features_of_reference(
    metrics: Sequence[Metric], extractors: Mapping[str, Extractor], reference: Reference | None, setting: Setting
) -> tuple[Mapping[str, Moments], Rows]:
    """(moments, rows) of the reference, as far as the metrics need them."""

    def needed(kind: str) -> dict[str, Extractor]:
        keys = (key for metric in metrics if metric.against == kind for key in metric.features)
        return {label: extractors[label] for label in dict.fromkeys(key.split(".")[0] for key in keys)}

    if reference is None:
        return {}, {}
    extraction = setting.extraction("reference")
    wanted = {kind: needed(kind) for kind in ("rows", "moments")}
    rows = reference.rows(wanted["rows"], extraction) if wanted["rows"] else {}  # first, as moments can be made of them
    return reference.moments(wanted["moments"], extraction) if wanted["moments"] else {}, rows


def _facts_of_networks(networks: Networks) -> dict[str, dict[str, Any]]:
    """What provenance says about each network, by label, and about each weights file that a metric loads itself."""
    facts: dict[str, dict[str, Any]] = {
        label: {"sha256": e.sha256, "published": e.published, "preparation": e.preparation}
        for label, e in networks.extractors.items()
    }
    for name, path in networks.files.items():
        sha256 = sha256_of_files([path])
        facts[name] = {"sha256": sha256, "published": is_published(path, sha256, PUBLISHED[name])}
    return facts


def _full_name(
    name: str,
    metric: Metric,
    protocol: Protocol,
    images: Images,
    reference: Reference | None,
    networks: Mapping[str, Mapping[str, Any]],
) -> str:
    """A score's name with everything in which it departs from the protocol: "fid@5000 vs photos (other weights 1a2b)".

    Args:
        networks: as `_facts_of_networks` returns them.
    """
    count = len(images)
    whole = name if count == protocol.num_samples else f"{name}@{count}"
    if images.labels is not None and protocol.num_classes is not None and count >= _PER_CLASS * protocol.num_classes:
        there = len(images.labels.unique())
        whole += f" ({there} of {protocol.num_classes} classes)" if there < protocol.num_classes else ""
    if metric.against is not None and reference is not None and not reference.is_protocols:
        whole += f" vs {Path(reference.name).name}"
    used = dict.fromkeys([*(key.split(".")[0] for key in metric.features), *metric.files])
    other = [networks[name]["sha256"][:8] for name in used if not networks[name]["published"]]
    return whole + (f" (other weights {', '.join(other)})" if other else "")


def _warn_of_count(images: Images, protocol: Protocol) -> None:
    if protocol.num_samples is not None and len(images) < protocol.num_samples:
        warnings.warn(
            f"{images.name}: {len(images)} images, and protocol {protocol.name!r} wants {protocol.num_samples}; the "
            "scores' names show the count, and the scores cannot be compared with published ones",
            stacklevel=3,
        )


#: A fact about images, which counts some of them -> what is said of those.
_WARNED_OF = {
    "lossy_files": "samples are lossy files (JPEG, WebP), whose artefacts change scores; write PNG",
    "turned_by_camera": "images are marked by a camera as turned (EXIF), and are measured as they are stored, as "
    "published scores are; training turns such images upright",
}


def _warn_of_some(images: Images) -> None:
    for fact, said in _WARNED_OF.items():
        if count := images.facts.get(fact, 0):
            warnings.warn(f"{images.name}: {count} of {len(images)} {said}", stacklevel=3)


def _check_resolution(images: Images, reference: Reference | None, protocol: Protocol) -> None:
    """Raises ArgumentError if samples and reference differ in size, as features of 32x32 and of 64x64 images cannot be
    compared.

    A protocol that fixes the size has checked it already.
    """
    if protocol.size is not None or reference is None or reference.resolution is None:
        return
    resolution = images.facts.get("resolution", reference.resolution)  # unknown before the first sample is made
    if resolution != reference.resolution:
        raise ArgumentError(
            f"reference {reference.name} has images of {reference.resolution}, samples {images.name} of {resolution}; "
            "expected the same size"
        )


def _provenance(
    images: Images, reference: Reference | None, networks: Mapping[str, Mapping[str, Any]], setting: Setting
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
        "reference": None if reference is None else reference.provenance(),
        "extractors": networks,
        "dtype": "float32 features, float64 statistics; distances for precision and recall in float32",
        "batch_size": setting.batch_size,
        **protocol.facts,
        **images.facts,
        **_renamed(images.facts),
    }


def _renamed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts from a folder's manifest, under the names that facts of generated samples have."""
    found: dict[str, Any] = {}
    if "seed" in facts:
        found["seeds"] = [facts["seed"]]
    if facts.get("images_per_second"):
        found["seconds_per_image"] = 1 / facts["images_per_second"]
    return found

"""Scores of a folder of samples, a student or a teacher by a named protocol, with everything needed to repeat them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.protocols import get_protocol
from evaluation.protocols.protocol import Protocol
from evaluation.samples import read_images, read_manifest
from fdistill import __version__
from fdistill.devices import start
from fdistill.errors import ArgumentError, did_you_mean
from fdistill.files import atomic_file, check_file
from fdistill.generation import Source, batches, check_counts, counted_evaluations, open_source, told_of
from fdistill.pipeline import is_student

_MANIFEST_KEYS = (
    "checkpoint",
    "checkpoint_sha256",
    "kind",
    "seed",
    "guidance",
    "evaluations_per_image",
    "images_per_second",
    "device",
)


@dataclass(frozen=True)
class Samples:
    """images uint8 [N, C, H, W], labels [N] or None, and where they came from."""

    images: Tensor
    labels: Tensor | None
    provenance: dict[str, Any]


def evaluate(
    samples: str | Path,
    *,
    reference: str | Path | None = None,
    protocol: str = "digits",
    metrics: Sequence[str] | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    num_steps: int = 18,
    guidance_scale: float = 1.0,
    network: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures generated images.

    Args:
        samples: a folder of PNG files, or a student or teacher, which is then asked for the protocol's sample count.
        reference: the protocol's own data set by default, its name, or a folder of PNG files.
        protocol: a key of `evaluation.protocols.PROTOCOLS`.
        metrics: names out of the protocol's; by default all that the samples allow (class accuracy needs labels).
        output: a JSON file to write the result to.
        seed, num_steps, guidance_scale, network, device: as in `fdistill.generate`, where `samples` is a checkpoint.

    Returns:
        {"metrics": {name: number}, "provenance": {...}}. A score of another sample count or against another reference
        than the protocol's says so in its name: "fd_digits@500", "fd_digits vs folder".

    Raises:
        ArgumentError, CheckpointError: samples, reference, protocol or metric that cannot be used.
        OutputError: the JSON file cannot be written.
    """
    chosen = get_protocol(protocol)
    wanted = tuple(metrics) if metrics else chosen.metrics
    for name in wanted:
        if name not in chosen.metrics:
            raise ArgumentError(f"metrics: protocol {protocol!r} has no {name!r}; {did_you_mean(name, chosen.metrics)}")
    real, reference_name = _reference(chosen, reference)
    folder = Path(samples)
    if output is not None:
        check_file(Path(output))
    # A run folder has pictures of its own, so what is a student is asked for samples before files are looked for.
    a_folder_of_images = not is_student(folder) and not is_student(folder / "student") and any(folder.glob("*.png"))
    if a_folder_of_images:
        made = _read(folder, chosen)
    else:
        _, chosen_device = start(device)
        check_counts(chosen.num_samples, 1, seed)
        source = open_source(
            samples, chosen_device, num_steps=num_steps, guidance_scale=guidance_scale, network=network
        )
        made = _generate(source, chosen, seed, chosen_device)
    for what, images in ((str(samples), made.images), (reference_name, real)):
        if tuple(images.shape[1:]) != chosen.sample_shape:
            raise ArgumentError(
                f"{what}: images of {tuple(images.shape[1:])} (C, H, W); "
                f"protocol {protocol!r} expected {chosen.sample_shape}"
            )
    missing = [name for name in wanted if name in chosen.needs_labels and made.labels is None]
    if missing and metrics:
        raise ArgumentError(
            f"metrics: {', '.join(missing)} needs labels, and {samples} has no manifest.json with labels"
        )
    scores = chosen.score(made.images, made.labels, real, tuple(name for name in wanted if name not in missing))
    count = len(made.images)
    suffix = "" if count == chosen.num_samples else f"@{count}"
    suffix += "" if reference_name == chosen.reference else f" vs {Path(reference_name).name}"
    result = {
        "metrics": {name + suffix: value for name, value in scores.items()},
        "provenance": {
            "protocol": protocol,
            "num_samples": count,
            "protocol_num_samples": chosen.num_samples,
            "reference": reference_name,
            "reference_num_samples": len(real),
            "reference_sha256": hashlib.sha256(real.numpy().tobytes()).hexdigest(),
            **chosen.provenance(),
            **made.provenance,
            "versions": _versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }
    if output is not None:
        with atomic_file(Path(output)) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _reference(protocol: Protocol, reference: str | Path | None) -> tuple[Tensor, str]:
    if reference is None or str(reference) == protocol.reference:
        return protocol.load_reference(), protocol.reference
    if not Path(reference).is_dir():
        raise ArgumentError(
            f"reference {str(reference)!r}: no such folder; expected one of .png files, or {protocol.reference!r}, "
            f"the data of protocol {protocol.name!r}"
        )
    return read_images(Path(reference)), str(reference)


def _read(folder: Path, protocol: Protocol) -> Samples:
    images, manifest = read_images(folder), read_manifest(folder)
    if protocol.prompts is not None and manifest.get("prompts") != protocol.prompts()[: len(images)]:
        raise ArgumentError(
            f"{folder}: its manifest.json does not say that its images were drawn from the prompts of protocol "
            f"{protocol.name!r}, in their order; evaluate the student or teacher itself, or generate them from those"
        )
    labels = manifest.get("labels")
    if labels is not None and not (
        isinstance(labels, list) and len(labels) == len(images) and all(type(label) is int for label in labels)
    ):
        raise ArgumentError(
            f"{folder}: expected {len(images)} whole numbers as labels in manifest.json, one for each image; "
            "generate the samples again"
        )
    provenance = {"samples": str(folder), **{key: manifest.get(key) for key in _MANIFEST_KEYS}}
    return Samples(images, None if labels is None else torch.tensor(labels), provenance)


def _generate(source: Source, protocol: Protocol, seed: int, device: torch.device) -> Samples:
    count = protocol.num_samples
    told = told_of(source, count, prompts=None if protocol.prompts is None else protocol.prompts())
    with counted_evaluations(source.denoiser) as evaluations:
        images = [part for _, part in batches(source, seed, range(count), told, 256, device, progress=True)]
        evaluations.images = count
    provenance = {
        "samples": "generated",
        "checkpoint": source.name,
        "checkpoint_sha256": source.weights_sha256,
        "kind": "teacher" if source.num_steps else "student",
        "seed": seed,
        "guidance": source.guidance_scale,
        "evaluations_per_image": evaluations.per_image,
        "device": str(device),
    }
    return Samples(torch.cat(images), told if isinstance(told, Tensor) else None, provenance)


def _versions() -> dict[str, str]:
    packages = ("torch", "torch-fidelity", "diffusers", "numpy")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"fdistill": __version__, "python": platform.python_version(), **found}

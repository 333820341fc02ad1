"""Scores of images, a student, a teacher or a pipeline by a named protocol, with all that is needed to repeat them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from evaluation.classifier import with_classifier
from evaluation.extractors import Extractor
from evaluation.generated import GeneratedImages
from evaluation.images import Images, open_views
from evaluation.measure import Measurement, Setting, measure
from evaluation.metrics.score import Score
from evaluation.protocols import get_protocol
from evaluation.protocols.protocol import Protocol
from evaluation.reference import open_against
from evaluation.weights import Weights
from fdistill import __version__
from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.errors import ArgumentError
from fdistill.base.files import atomic_file, check_file, read_json_object
from fdistill.data.prompts import read_prompts
from fdistill.data.source import is_image
from fdistill.generation.generate import check_counts, check_unread, open_source
from fdistill.students.folder import STUDENT_FILE, find_student, student_folder

#: What provenance says of a student's training; "ema" is the average that its weights are.
_TRAINING = ("method", "divergence", "teacher", "teacher_guidance", "iterations", "ema", "seed")
_ARCHIVES = (".zip", ".npz", ".tar", ".parquet")
_OF_CHECKPOINTS = (".json", ".safetensors")
_EXPECTED = (
    "images (a folder, .zip, .npz, .tar or .parquet), or the folder or hub id of a student, run, teacher or pipeline"
)


def evaluate(
    samples: str | Path,
    *,
    reference: str | Path | None = None,
    protocol: str = "digits",
    metrics: Sequence[str] | None = None,
    output: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    num_images: int | None = None,
    prompts: str | Path | None = None,
    weights: Weights | None = None,
    batch_size: int = 64,
    sampler: str = "heun",
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    resolution: int | None = None,
    network: str | None = None,
    device: str = "auto",
    replicates: int = 20,
    classifier: str | None = None,
) -> dict[str, Any]:
    """Measures generated images.

    Args:
        samples: images (a folder, zip or npz), or what makes them: a student, a run folder, a teacher, or any diffusers
            pipeline, which is then asked for the protocol's sample count.
        reference: images, or a file of statistics (see `evaluation.statistics_files`); the protocol's own where it has
            one.
        protocol: a key of `evaluation.protocols.PROTOCOLS`.
        metrics: names out of the protocol's; by default those it is known for, as far as samples and reference allow.
        output: a JSON file to write the result to; beside it, where authenticity is measured, a picture of the samples
            nearest to a training image, each above it.
        seeds: of generated samples. Several give each score's mean, and its standard deviation over them.
        num_images: another count than the protocol's; it will show in the names of scores.
        prompts: a file with a prompt a line, for a protocol that asks for one, or for images without.
        weights: where files of published weights are, as `evaluation.weights.parse_weights` makes it.
        batch_size: images at a time, in generation and extraction. Features vary in their last bits with it.
        sampler, num_steps, guidance_scale, negative_prompt, resolution, network, device: as in `fdistill.generate`,
            where `samples` is a checkpoint.
        replicates: of the bootstrap that gives distances their spread; 0 leaves it out.
        classifier: "module:function", which returns a torch module from images float32 [B, C, H, W] in [-1, 1] to
            logits [B, classes], for class_accuracy in protocols that have no classifier of their own.

    Returns:
        {"metrics": {name: number}, "spread": {name: {"value": number, "of": text}}, "provenance": {...}}. A score of
        another sample count, reference or extractor than the protocol's says so in its name: "fd_digits@500",
        "fid vs folder", "fid (other weights 1a2b3c4d)".

    Raises:
        ArgumentError, CheckpointError, DataError: samples, reference, protocol, metric or weights that cannot be used.
        NonFiniteError: a generated image is not finite.
        OutputError: the JSON file cannot be written.
    """
    chosen = get_protocol(protocol)
    if output is not None:
        check_file(Path(output))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ArgumentError(f"seeds: got {list(seeds)}; expected one or more, each once")
    if replicates < 0 or replicates == 1:
        raise ArgumentError(f"replicates: got {replicates}; expected 0 for no spread, or at least 2")
    count = chosen.num_samples if num_images is None else num_images
    for seed in seeds:
        check_counts(1 if count is None else count, batch_size, seed)
    _, on = start(device)
    own: dict[str, Extractor] = {}
    if classifier is not None:
        chosen, own["classifier"] = with_classifier(chosen, classifier, on)
    setting = Setting(chosen, on, metrics, batch_size, weights or {}, replicates, own, pictures=output is not None)
    if prompts is not None and chosen.prompts is not None:
        raise ArgumentError(f"prompts: protocol {protocol!r} has its own; leave them out")
    listed = None if prompts is None else read_prompts(Path(prompts))
    against = open_against(chosen, reference)
    measurements: list[Measurement] = []
    if holds_images(samples):
        check_unread(
            f"the images of {samples} are made already",
            seeds=None if tuple(seeds) == (0,) else seeds,
            steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt or None,
            resolution=resolution,
            network=network,
            sampler=None if sampler == "heun" else sampler,
        )
        views = _images_there(samples, chosen, num_images, listed)
        measurements.append(measure(views, against, setting))
    else:
        if count is None:
            raise ArgumentError(
                f"num_images: protocol {protocol!r} takes any number; say how many images {samples} is to make"
            )
        source = open_source(
            samples,
            on,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            resolution=resolution,
            network=network,
            sampler=sampler,
        )
        if listed is not None and not source.takes_prompts:
            raise ArgumentError(f"prompts: {source.name} is told none; leave them out, or pass a text-to-image model")
        asked = _told(chosen, listed, count) if source.takes_prompts else None
        for seed in seeds:
            made = GeneratedImages(source, seed, count, asked, on, chosen)
            measurements.append(measure(made.views(chosen), against, setting))
        if source.kind == "student":
            measurements[0].provenance["student"] = _training(samples)
    result = _result(measurements, None if holds_images(samples) else list(seeds))
    if output is not None and rng.world()[0] == 0:
        with atomic_file(Path(output)) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for name, picture in measurements[0].pictures.items():
            with atomic_file(Path(output).with_suffix(f".{name}.png")) as temporary:
                picture.save(temporary, format="PNG")
    return result


def _images_there(
    samples: str | Path, protocol: Protocol, num_images: int | None, listed: list[str] | None
) -> dict[str, Images]:
    """The images in the protocol's views, with the listed prompts if there are any."""
    recipes = {"": (protocol.recipe, protocol.size), **protocol.views}
    count = protocol.num_samples if num_images is None else num_images
    ordered = listed is not None or protocol.prompts is not None or protocol.asks_prompts
    views = open_views(samples, recipes, channels=protocol.channels, max_images=count, in_order=ordered)
    images = views[""]
    there = images.facts["available"]
    if num_images is not None and there < num_images:
        raise ArgumentError(f"num_images: got {num_images}, and {samples} holds {there}; expected at most as many")
    if there > len(images):
        warnings.warn(
            f"{samples}: holds {there:,} images, of which {'the first ' if ordered else ''}{len(images):,}"
            f"{'' if ordered else ', drawn evenly and the same each time,'} are measured",
            stacklevel=3,
        )
    if listed is not None:
        told = in_turn(listed, len(images))
        if images.prompts is not None and list(images.prompts) != told:
            raise ArgumentError(
                f"prompts: the list is not what the images of {samples} were drawn from; leave it out, or generate the "
                "images anew"
            )
        if images.prompts is None and len(listed) < len(images):
            raise ArgumentError(
                f"prompts: {len(listed)} in the list for {len(images)} images; expected one for each, in order"
            )
        images.prompts = told
    return views


def holds_images(where: str | Path) -> bool:
    """Whether it is images that are there, and not something that makes them.

    A run folder has pictures of its own, so what is a student or a pipeline is not looked through for any.

    Raises:
        ArgumentError: a file or folder that can be neither.
    """
    path = Path(where)
    if path.suffix in _ARCHIVES and path.is_file():
        return True
    if path.is_file() or (path.suffix in _ARCHIVES and not path.exists()):
        what = "is a file of another kind" if path.is_file() else "no such file"
        raise ArgumentError(f"samples {where}: {what}; expected {_EXPECTED}")
    if not path.is_dir() or find_student(path) or (path / "model_index.json").is_file():
        return False
    if any(is_image(file.name) for file in path.rglob("*")):
        return True
    if not any(file.suffix in _OF_CHECKPOINTS for file in path.rglob("*")):
        raise ArgumentError(f"samples {where}: has neither images nor a network in it; expected {_EXPECTED}")
    return False


def _training(samples: str | Path) -> dict[str, Any]:
    facts = read_json_object(student_folder(samples) / STUDENT_FILE)
    return {key: facts[key] for key in _TRAINING if key in facts}


def _told(protocol: Protocol, listed: list[str] | None, count: int) -> list[str]:
    """What a text-to-image model is asked for."""
    if listed is None and protocol.prompts is None:
        raise ArgumentError(
            f"prompts: protocol {protocol.name!r} has none of its own, and a text-to-image model is to be told some; "
            "pass a file with one a line, or choose a protocol that has them, such as digits-t2i"
        )
    _check_enough(protocol, listed, count)
    return protocol.prompts() if listed is None and protocol.prompts is not None else in_turn(listed or [], count)


def _check_enough(protocol: Protocol, listed: Sequence[str] | None, count: int) -> None:
    if listed is not None and protocol.asks_prompts and len(listed) < count:
        raise ArgumentError(
            f"prompts: {len(listed)} for {count} images, and protocol {protocol.name!r} draws each once"
        )


def in_turn(prompts: Sequence[str], count: int) -> list[str]:
    """A prompt for each of `count` images."""
    return [prompts[i % len(prompts)] for i in range(count)]


def _result(measurements: Sequence[Measurement], generated: list[int] | None) -> dict[str, Any]:
    """One result of the measurements of several seeds: means, and their standard deviation.

    Args:
        generated: the seeds; None for images that were there.
    """
    first = measurements[0]
    scores = {name: _over_seeds([one.scores[name] for one in measurements]) for name in first.scores}
    return {
        "metrics": {name: score.value for name, score in scores.items()},
        "spread": {
            name: {"value": score.spread, "of": score.spread_of}
            for name, score in scores.items()
            if score.spread is not None
        },
        **(
            {}
            if len(measurements) == 1
            else {
                "seeds": {
                    str(seed): {name: score.value for name, score in one.scores.items()}
                    for seed, one in zip(generated or [], measurements, strict=True)
                }
            }
        ),
        "provenance": {
            **first.provenance,
            **({} if generated is None else {"seeds": generated}),
            "versions": _versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }


def _over_seeds(scores: Sequence[Score]) -> Score:
    if len(scores) == 1:
        return scores[0]
    values = [score.value for score in scores]
    return Score(statistics.fmean(values), statistics.stdev(values), f"{len(values)} seeds")


def describe(result: Mapping[str, Any]) -> str:
    """A result as lines for a terminal."""
    metrics, spreads = result["metrics"], result["spread"]
    width = max(len(name) for name in metrics)
    lines = []
    for name, value in metrics.items():
        spread = spreads.get(name)
        told = "" if spread is None else f" +- {spread['value']:.4f}  ({spread['of']})"
        lines.append(f"{name:<{width}}  {round(value, 4) + 0.0:.4f}{told}")  # -0.0 + 0.0 is 0.0
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    packages = ("torch", "torch-fidelity", "open-clip-torch", "diffusers", "numpy", "pillow")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"fdistill": __version__, "python": platform.python_version(), **found}

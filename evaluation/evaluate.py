"""Scores of images, a student, a teacher or a pipeline by a named protocol; `fdistill evaluate`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL.Image import Image as PILImage

from evaluation.classifier import with_classifier
from evaluation.extractors import Extractor
from evaluation.generated import GeneratedImages
from evaluation.images import Images, open_views
from evaluation.measure import Measurement, measure
from evaluation.metrics.score import Score
from evaluation.pairing import in_turn, prompts_of
from evaluation.protocols import get_protocol
from evaluation.protocols.protocol import Protocol
from evaluation.reference import open_reference
from evaluation.setting import Setting
from evaluation.weights import Weights
from fdistill import __version__
from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.errors import ArgumentError, OutputError
from fdistill.base.files import atomic_file, check_file, is_stream
from fdistill.base.reading import not_here
from fdistill.data import is_stored, looks_stored, stored_kinds
from fdistill.data.account import say
from fdistill.data.listing import MEANT_AS_IMAGES
from fdistill.data.prompts import PromptList, read_prompt_list
from fdistill.data.tree import FolderTree
from fdistill.generation.generate import check_counts, open_maker
from fdistill.generation.maker import Maker, describe_maker
from fdistill.generation.sampling import Sampling, check_unread
from fdistill.students.folder import find_student, student_facts, student_folder

__all__ = ["evaluate"]

#: What provenance says about a student's training; "ema" says which average of the weights it is.
_TRAINING = ("method", "divergence", "teacher", "teacher_guidance", "iterations", "ema", "seed")
_CHECKPOINT_FILES = (".json", ".safetensors")


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
    guidance_teacher: str | None = None,
    negative_prompt: str = "",
    resolution: int | None = None,
    network: str | None = None,
    device: str = "auto",
    replicates: int = 20,
    classifier: str | None = None,
    allow_skipped: bool = False,
    shown: Callable[[Mapping[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Scores images, or what makes them, by a protocol.

    Args:
        samples: images in any form that `fdistill.data` opens, or a student, a run folder, a teacher or a diffusers
            pipeline, which then generates as many images as the protocol wants.
        reference: images, or a statistics file (see `evaluation.statistics_files`); by default the protocol's embedded
            reference, if it has one.
        protocol: a key of `evaluation.protocols.PROTOCOLS`.
        metrics: names of metrics of the protocol; by default its default ones, as far as samples and reference allow.
        output: a JSON file for the result. Pictures of metrics that draw one are written beside it: for authenticity
            the samples nearest to training images, for preference scores samples beside the teacher's images.
        seeds: of generated samples, each in [0, 2^64). With several, each score is the mean over seeds, and its spread
            their standard deviation.
        num_images: number of samples, if not the protocol's; names of scores then say it.
        prompts: a file with one prompt in each line: of finished images that have none, or to generate images of, for a
            protocol without prompts of its own. Lines of a .jsonl file may say which image they are of ("file_name");
            all other lists go with the images in their order.
        weights: weights files, as `evaluation.weights.parse_weights` returns them.
        batch_size: images at a time, when they are generated and when features are extracted. The last bits of features
            depend on it.
        sampler, num_steps, guidance_scale, guidance_teacher, negative_prompt, resolution, network, device: as in
            `fdistill.generate`, if `samples` is something that makes images.
        replicates: bootstrap replicates behind the spread of Frechet distances; 0 for no spread, else at least 2.
        classifier: "module:function" for class_accuracy in a protocol without a classifier of its own. The function
            returns a torch module that maps images float32 [B, C, H, W] in [-1, 1] to logits [B, classes].
        shown: is called with the result before it is written to `output`, so that no score is lost or waits.
        allow_skipped: score images, or against a reference, of which more than 1 % cannot be read: linked folders,
            other formats.

    Returns:
        {"metrics": {name: number}, "spread": {name: {"value": number, "of": text}}, "provenance": {...}}. A name
        says how its score departs from the protocol: "fd_digits@500", "fid vs folder", "fid (other weights 1a2b3c4d)".

    Raises:
        ArgumentError, CheckpointError, DataError: samples, reference, protocol, metric or weights that cannot be used.
        NonFiniteError: a generated image is not finite.
        OutputError: the JSON file cannot be written; if that shows after measuring, the message has the scores.
    """
    chosen = get_protocol(protocol)
    if output is not None:
        check_file(Path(output))
    sampling = Sampling(
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        guidance_teacher=guidance_teacher,
        negative_prompt=negative_prompt,
        resolution=resolution,
        network=network,
        sampler=sampler,
    )
    count = chosen.num_samples if num_images is None else num_images
    _check_numbers(seeds, 1 if count is None else count, batch_size, replicates)
    _, on = start(device)
    own: dict[str, Extractor] = {}
    if classifier is not None:
        chosen, own["classifier"] = with_classifier(chosen, classifier, on)
    setting = Setting(chosen, on, metrics, batch_size, weights or {}, replicates, own, pictures=output is not None)
    listed = None if prompts is None else read_prompt_list(Path(prompts))
    opened = open_reference(chosen, reference, allow_skipped=allow_skipped)
    if holds_images(samples):
        seeded = [] if tuple(seeds) == (0,) else ["seeds"]
        check_unread(
            f"{samples} are finished images; these options apply only to generating", [*seeded, *sampling.given()]
        )
        views = _images_there(samples, chosen, num_images, listed, allow_skipped)
        _say_what_was_read(views[""], listed)
        measurements = [measure(views, opened, setting)]
        result = _result(measurements, None)
    else:
        if count is None:
            raise ArgumentError(
                f"num_images: protocol {protocol!r} takes any number; say how many images {samples} should make"
            )
        maker = open_maker(samples, on, sampling)
        say(f"checkpoint {maker.name}", describe_maker(maker))
        wanted = _prompts_of(maker, chosen, None if listed is None else listed.prompts, count)
        images = [GeneratedImages(maker, seed, count, wanted, on, chosen) for seed in seeds]
        measurements = [measure(made.views(chosen), opened, setting) for made in images]
        if maker.kind == "student":
            measurements[0].provenance["student"] = _training(samples)
        result = _result(measurements, list(seeds))
    if shown is not None and rng.world()[0] == 0:
        shown(result)
    if output is not None and rng.world()[0] == 0:
        _write(result, measurements[0].pictures, Path(output), shown is not None)
    return result


def _check_numbers(seeds: Sequence[int], count: int, batch_size: int, replicates: int) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ArgumentError(f"seeds: got {list(seeds)}; expected one or more, each once")
    if replicates < 0 or replicates == 1:
        raise ArgumentError(f"replicates: got {replicates}; expected 0 for no spread, or at least 2")
    for seed in seeds:
        check_counts(count, batch_size, seed)


def _write(result: Mapping[str, Any], pictures: Mapping[str, PILImage], output: Path, shown: bool) -> None:
    try:
        with atomic_file(output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for name, picture in {} if is_stream(output) else pictures.items():
            with atomic_file(output.with_suffix(f".{name}.png")) as temporary:
                picture.save(temporary, format="PNG")
    except OutputError as error:
        if shown:
            raise
        raise OutputError(f"{error}; what was measured:\n{describe(result)}") from error


def _images_there(
    samples: str | Path, protocol: Protocol, num_images: int | None, listed: PromptList | None, allow_skipped: bool
) -> dict[str, Images]:
    """Images that exist already, in the views of the protocol, with the listed prompts if there are any."""
    count = protocol.num_samples if num_images is None else num_images
    ordered = listed is not None or protocol.prompts is not None or protocol.asks_prompts
    views = open_views(
        samples,
        protocol.sample_views(),
        channels=protocol.channels,
        max_images=count,
        in_order=ordered,
        allow_skipped=allow_skipped,
    )
    images = views[""]
    there = images.facts["available"]
    if num_images is not None and there < num_images:
        raise ArgumentError(f"num_images: got {num_images}, and {samples} holds {there}; expected at most as many")
    if there > len(images):
        which = f"the first {len(images):,}" if ordered else f"{len(images):,}, drawn evenly and the same each time,"
        warnings.warn(f"{samples}: holds {there:,} images, of which {which} are measured", stacklevel=3)
    if listed is not None:
        images.prompts = prompts_of(images, listed)
    return views


def _say_what_was_read(images: Images, listed: PromptList | None) -> None:
    if images.account is not None:
        say(f"samples {images.name}", images.account.sentence())
    if listed is not None:
        how = "in order" if listed.files is None or images.files is None else "by file_name"
        say("prompts", f"{len(listed.prompts):,}, which go with the {len(images):,} images {how}")


def holds_images(where: str | Path) -> bool:
    """Whether `where` is images, and not something that makes them.

    A student or pipeline makes images, even if pictures lie in its folder, as in a run folder.

    Raises:
        ArgumentError: a file or folder that is neither.
    """
    path = Path(where)
    if find_student(path) or (path / "model_index.json").is_file():
        return False
    if is_stored(str(where)):
        return True
    if path.is_dir():
        listing = FolderTree(path).listing()
        if listing.images:
            return True
        if any(file.suffix in _CHECKPOINT_FILES for file in path.rglob("*")):
            return False
        if any(kind in listing.left_out for kind in MEANT_AS_IMAGES):
            return True  # opening it says what is there in place of images
        what = "holds neither images nor a network"
    elif path.is_file():
        what = "is a file of another kind"
    elif looks_stored(str(where)):
        what = not_here(path)
    else:
        return False
    raise ArgumentError(
        f"samples {where}: {what}; expected images ({stored_kinds()}), or the folder or hub id of a student, run, "
        "teacher or pipeline"
    )


def _training(samples: str | Path) -> dict[str, Any]:
    facts = student_facts(student_folder(samples))
    return {key: facts[key] for key in _TRAINING if key in facts}


def _prompts_of(maker: Maker, protocol: Protocol, listed: list[str] | None, count: int) -> list[str] | None:
    """The prompts of `count` images; None for a model without prompts."""
    if not maker.takes_prompts:
        if listed is not None:
            raise ArgumentError(f"prompts: {maker.name} takes none; leave them out, or pass a text-to-image model")
        return None
    if listed is not None and protocol.prompts is not None:
        raise ArgumentError(
            f"prompts: protocol {protocol.name!r} has its own, which {maker.name} draws; leave them out"
        )
    if listed is None and protocol.prompts is None:
        raise ArgumentError(
            f"prompts: protocol {protocol.name!r} has none of its own, and {maker.name} is a text-to-image model; pass "
            "a file with one prompt in each line, or choose a protocol that has prompts, such as digits-t2i"
        )
    if listed is not None and protocol.asks_prompts and len(listed) < count:
        raise ArgumentError(
            f"prompts: {len(listed)} for {count} images, and protocol {protocol.name!r} uses each prompt once"
        )
    return protocol.prompts() if listed is None and protocol.prompts is not None else in_turn(listed or [], count)


def _result(measurements: Sequence[Measurement], seeds: list[int] | None) -> dict[str, Any]:
    """The result of one measurement, or of several seeds' as means and standard deviations.

    Args:
        seeds: of generated samples, one for each measurement; None for images that existed already.
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
                    for seed, one in zip(seeds or [], measurements, strict=True)
                }
            }
        ),
        "provenance": {
            **first.provenance,
            **({} if seeds is None else {"seeds": seeds}),
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
        deviation = "" if spread is None else f" +- {spread['value']:.4f}  ({spread['of']})"
        lines.append(f"{name:<{width}}  {round(value, 4) + 0.0:.4f}{deviation}")  # -0.0 + 0.0 is 0.0
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    packages = ("torch", "torch-fidelity", "open-clip-torch", "diffusers", "numpy", "pillow")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"fdistill": __version__, "python": platform.python_version(), **found}

"""Scores of a student while it is trained, by a small protocol, and which student is the best so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evaluation.generated import GeneratedImages
from evaluation.measure import measure
from evaluation.protocols import get_protocol
from evaluation.protocols.protocol import Protocol
from evaluation.reference import open_reference
from evaluation.setting import Setting
from evaluation.weights import parse_weights
from fdistill.base.errors import ArgumentError, ConfigError, DataError
from fdistill.base.rng import world
from fdistill.condition import TextCondition
from fdistill.data.embeddings import Embeddings
from fdistill.data.prompts import read_prompts
from fdistill.generation.network_maker import NetworkMaker
from fdistill.teachers.text_encoders import CutPrompt

_PREFIX = "eval/"

_T = TypeVar("_T", bound="_Samples")


@dataclass(frozen=True)
class WatchSettings:
    """How a run is scored: the settings of its config's `eval` section, and its seed.

    Attributes:
        protocol: a key of `evaluation.protocols.PROTOCOLS`.
        num_images: samples for each measurement; None for the protocol's number.
        metrics: names that the protocol knows; None for its default metrics.
        metric: the score that says which student is best; None for the first one that can be measured.
        reference: images or a statistics file; None for the protocol's embedded reference.
        prompts: a file with one prompt in each line, for protocols without prompts of their own.
        weights: as --weights of `fdistill evaluate`.
        batch_size: images at a time.
        seed: of the samples.
        allow_skipped: as in `evaluate`.
    """

    protocol: str
    num_images: int | None = None
    metrics: list[str] | None = None
    metric: str | None = None
    reference: str | None = None
    prompts: str | None = None
    weights: list[str] = field(default_factory=list)
    batch_size: int = 64
    seed: int = 0
    allow_skipped: bool = False


@dataclass(frozen=True)
class WatchedStudent:
    """The student that is scored, whose weights change between measurements.

    Attributes:
        maker: makes its images; without a text encoder, as prompts are encoded beforehand.
        image_shape: (C, H, W) of its images.
        encode: encodes prompts, or reads them from a cache; None for a student without prompts.
        sharded: whether each process holds a part of it, so that all must run it equally often.
    """

    maker: NetworkMaker
    image_shape: tuple[int, int, int]
    encode: Callable[[Sequence[str]], Embeddings] | None = None
    sharded: bool = False


class StoredPrompts:
    """Prompts that were encoded before the run, in place of text encoders."""

    def __init__(self, prompts: Sequence[str], source: Embeddings):
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._source = source

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Does nothing: embeddings are read from a file."""
        yield

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """The embeddings of prompts that are among the stored ones."""
        return self._source.rows(torch.tensor([self._rows[prompt] for prompt in prompts]))

    def cut(self, prompts: Sequence[str]) -> list[CutPrompt]:
        """None: prompts that are too long were reported when they were encoded."""
        return []


class _Samples(GeneratedImages):
    """Generated images that are each drawn once, without timing batches.

    Attributes:
        shape: (C, H, W) of an image.
    """

    shape: tuple[int, int, int]

    @contextmanager
    def measured(self, batch_size: int) -> Iterator[None]:
        self.facts["resolution"] = f"{self.shape[2]}x{self.shape[1]}"
        with self._maker.on(self._device):
            yield


class _Noise(_Samples):
    """Random bytes in the shape of samples."""

    def _sample(self, indices: Sequence[int]) -> Tensor:
        drawn = np.random.default_rng(indices[0]).integers(0, 256, (len(indices), *self.shape), dtype=np.uint8)
        return torch.from_numpy(drawn)


class Watch:
    """Scores a student whenever it is asked to, and says whether it is the best so far.

    Everything except the student is tried out on random images when the watch is made. So settings that do not fit are
    refused, and the features of the reference are known, before a run starts.

    Args:
        student: is scored with the weights that it has at the moment; the caller puts averaged weights into it.

    Raises:
        ConfigError: a protocol, reference, metric or number that this student cannot be scored by.
        CheckpointError, DataError: weights or prompts that cannot be read.
    """

    def __init__(self, student: WatchedStudent, settings: WatchSettings, device: torch.device):
        self._student, self._device, self._seed = student, device, settings.seed
        self._settings = settings
        try:
            protocol = get_protocol(settings.protocol)
            weights = parse_weights(settings.weights)
            self._setting = Setting(
                protocol, device, settings.metrics, settings.batch_size, weights, replicates=0, progress=False
            )
            _check_size(protocol, student.image_shape)
            count = settings.num_images or protocol.num_samples
            if count is None:
                raise ArgumentError(f"num_images: protocol {protocol.name!r} takes any number; say how many")
            if student.sharded:
                _check_even(count, settings.batch_size)
            self._count = count
            self._reference = open_reference(protocol, settings.reference, allow_skipped=settings.allow_skipped)
            self._prompts = _prompts(settings.prompts, student, protocol, count)
            self._maker = _with_prompts(student, self._prompts)
            tried = self._measured(self._images(_Noise))
            # What is left out is said once, and weights that are not here are not looked for again.
            self._setting = replace(self._setting, metrics=[_plain(name) for name in tried])
            self._decides = self._deciding(settings.metric, tried)
        except (ArgumentError, DataError) as error:
            raise ConfigError(f"eval: {error}") from error

    @property
    def read(self) -> dict[str, Any]:
        """What was read for the scores, for the run's data.json: reference and prompts, where they are files."""
        assert self._reference is not None
        views, given = self._reference.views, self._settings
        account = views[""].account if views else None
        found: dict[str, Any] = {} if account is None else {"eval_reference": account.facts()}
        if given.prompts is not None:
            found["eval_prompts"] = {"file": given.prompts, "count": len(self._prompts or [])}
        return found

    def describe(self) -> str:
        """What is measured, and which score decides."""
        return (
            f"{self._count} images by protocol {self._setting.protocol.name}, "
            f"the best by {self._decides.removeprefix(_PREFIX)} kept in best/"
        )

    def scores(self) -> dict[str, float]:
        """Scores of the student's present weights, {"eval/fd_digits@100": number}; the same on every process.

        Raises:
            NonFiniteError: an image is not finite.
        """
        return self._measured(self._images(_Samples))

    def is_best(self, scores: Mapping[str, float], earlier: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the deciding score is better than in each of a run's earlier records; NaN never is."""
        sign = 1 if self._higher_is_better(_plain(self._decides)) else -1
        value = scores[self._decides]
        others = [record[self._decides] for record in earlier if self._decides in record]
        return not math.isnan(value) and all(math.isnan(other) or sign * value > sign * other for other in others)

    def reason(self, scores: Mapping[str, float], iteration: int) -> str:
        """What a model card says about why the student of this iteration was kept."""
        name, protocol = self._decides.removeprefix(_PREFIX), self._setting.protocol.name
        return (
            f"the best {name} so far, {scores[self._decides]:.6g} after {iteration} iterations "
            f"(protocol {protocol}, seed {self._seed})"
        )

    def _images(self, kind: type[_T]) -> _T:
        images = kind(self._maker, self._seed, self._count, self._prompts, self._device, self._setting.protocol)
        images.shape = self._student.image_shape
        return images

    def _measured(self, images: GeneratedImages) -> dict[str, float]:
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(cuda), warnings.catch_warnings():
            # Once is enough, and `describe` says how many images there are.
            warnings.filterwarnings("ignore", message=".*scores' names show the count")
            scores = measure(images.views(self._setting.protocol), self._reference, self._setting).scores
        return {_PREFIX + name: score.value for name, score in scores.items()}

    def _higher_is_better(self, score: str) -> bool | None:
        return self._setting.protocol.names()[score].higher_is_better

    def _deciding(self, wanted: str | None, scores: Iterable[str]) -> str:
        """The name, as records have it, of the score that says which student is best."""
        full = {_plain(name): name for name in scores}
        known = self._setting.protocol.names()
        listed = self._setting.metrics or self._setting.protocol.default
        measured = [name for one in listed for name in (one, *known[one].outputs) if name in full]
        decides = measured[0] if wanted is None else wanted
        directed = [name for name in dict.fromkeys(measured) if self._higher_is_better(name) is not None]
        if decides not in directed:
            raise ArgumentError(
                f"metric: got {decides!r}; expected a score that is measured and has a better direction, high or low: "
                f"{', '.join(directed) or 'none here'}"
            )
        return full[decides]


def _plain(name: str) -> str:
    """fd_digits of "eval/fd_digits@100 vs photos"."""
    return name.removeprefix(_PREFIX).split(" ")[0].split("@")[0]


def _check_even(count: int, batch_size: int) -> None:
    processes = world()[1]
    if count % (batch_size * processes):
        raise ArgumentError(
            f"num_images: got {count} in batches of {batch_size}, but {processes} processes that share the student's "
            f"weights must make equally many batches; expected a multiple of {batch_size * processes}, or another "
            "eval.batch_size"
        )


def _check_size(protocol: Protocol, image_shape: tuple[int, int, int]) -> None:
    size = image_shape[1]
    if protocol.recipe == "exact" and protocol.size not in (None, size):
        raise ArgumentError(
            f"protocol: {protocol.name!r} measures images of {protocol.size}x{protocol.size}, and this student makes "
            f"{size}x{size}; expected a protocol of that size, or folder"
        )


def _prompts(file: str | None, student: WatchedStudent, protocol: Protocol, count: int) -> list[str] | None:
    """The prompts of the samples, in turn; None for a student without prompts."""
    if file is not None and (student.encode is None or protocol.prompts is not None):
        reason = "this student takes none" if student.encode is None else f"protocol {protocol.name!r} has its own"
        raise ArgumentError(f"prompts: got {file!r}, but {reason}; leave them out")
    if student.encode is None:
        return None
    if file is None and protocol.prompts is None:
        raise ArgumentError(
            f"prompts: protocol {protocol.name!r} has none of its own; expected a file with one prompt in each line"
        )
    prompts = read_prompts(Path(file)) if file is not None else []
    if protocol.prompts is not None:
        prompts = protocol.prompts()
    if protocol.asks_prompts and len(prompts) < count:
        raise ArgumentError(
            f"prompts: {len(prompts)} for {count} images, and protocol {protocol.name!r} uses each prompt once"
        )
    return prompts[:count]


def _with_prompts(student: WatchedStudent, prompts: Sequence[str] | None) -> NetworkMaker:
    """The student's maker, with its prompts encoded."""
    if prompts is None or student.encode is None:
        return student.maker
    different = list(dict.fromkeys(prompts))
    return replace(student.maker, text=StoredPrompts(different, student.encode(different)))

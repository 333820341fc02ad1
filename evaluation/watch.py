"""A run's student, measured while it learns: the averaged weights that are exported, by a small protocol."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evaluation.generated import GeneratedImages
from evaluation.measure import Setting, measure
from evaluation.metrics.score import higher_is_better
from evaluation.protocols import get_protocol
from evaluation.protocols.protocol import Protocol
from evaluation.reference import open_against
from evaluation.weights import parse_weights
from fdistill.base.errors import ArgumentError, ConfigError, DataError
from fdistill.condition import TextCondition
from fdistill.config.schema import DistillConfig
from fdistill.data.embeddings import Embeddings
from fdistill.data.prompts import read_prompts
from fdistill.generation.network_maker import Source
from fdistill.teachers.teacher import Teacher
from fdistill.teachers.text_encoders import CutPrompt
from fdistill.training.build import Distillation
from fdistill.training.cache import Encoding
from fdistill.training.prompts import Obtain, encode, open_prompts

_PREFIX = "eval/"

_T = TypeVar("_T", bound="_Samples")


class StoredPrompts:
    """Prompts that were encoded before the run, in place of their encoders."""

    def __init__(self, prompts: Sequence[str], source: Embeddings):
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._source = source

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Nothing to move: rows are read from a file."""
        yield

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        return self._source.rows(torch.tensor([self._rows[prompt] for prompt in prompts]))

    def cut(self, prompts: Sequence[str]) -> list[CutPrompt]:
        """None: what was cut was said when they were encoded."""
        return []


class _Samples(GeneratedImages):
    """Each made once: without the batches that say how long an image takes, and what size it has.

    Attributes:
        shape: of an image.
    """

    shape: tuple[int, int, int]

    @contextmanager
    def measured(self, batch_size: int) -> Iterator[None]:
        self.facts["resolution"] = f"{self.shape[2]}x{self.shape[1]}"
        with self._source.on(self._device):
            yield


class _Noise(_Samples):
    """Bytes in place of samples, of their shape."""

    def _sample(self, indices: Sequence[int]) -> Tensor:
        drawn = np.random.default_rng(indices[0]).integers(0, 256, (len(indices), *self.shape), dtype=np.uint8)
        return torch.from_numpy(drawn)


class Watch:
    """`config.eval`, ready to be asked for scores.

    All but the student is tried on noise here: what does not fit is refused, and the reference's features are known,
    before a run starts.

    Args:
        run: its student is measured as it is at the moment; the caller puts averaged weights into it.
        obtain: returns the folder of encoded prompts; see `fdistill.training.prompts.open_inputs`.

    Raises:
        ConfigError: a protocol, reference, metric or count that this run cannot be measured by.
        CheckpointError, DataError: weights or prompts that cannot be read.
    """

    def __init__(self, config: DistillConfig, run: Distillation, device: torch.device, obtain: Obtain = encode):
        section = config.eval
        self._run, self._device, self._seed = run, device, config.seed
        try:
            protocol = get_protocol(section.protocol)
            weights = parse_weights(section.weights)
            self._setting = Setting(
                protocol, device, section.metrics, section.batch_size, weights, replicates=0, progress=False
            )
            if protocol.recipe == "exact" and protocol.size not in (None, run.image_size):
                raise ArgumentError(
                    f"protocol: {protocol.name!r} measures images of {protocol.size}x{protocol.size}, and this student "
                    f"makes {run.image_size}x{run.image_size}; expected one of that size, or folder"
                )
            count = section.num_images or protocol.num_samples
            if count is None:
                raise ArgumentError(f"num_images: protocol {protocol.name!r} takes any number; say how many")
            self._count = count
            self._against = open_against(protocol, section.reference)
            self._prompts = _prompts(config, run, protocol, count)
            self._text = self._encoded(config, obtain)
            self._decides = self._deciding(section.metric, self._measured(self._images(_Noise)))
        except (ArgumentError, DataError) as error:
            raise ConfigError(f"eval: {error}") from error

    def _encoded(self, config: DistillConfig, obtain: Obtain) -> StoredPrompts | None:
        if self._prompts is None:
            return None
        run, prompts = self._run, list(dict.fromkeys(self._prompts))
        teacher = Teacher(run.checkpoint, run.networks.teacher, run.latents)
        encoding = Encoding(self._device, negative_prompt=config.negative_prompt, precision=config.frozen_precision)
        return StoredPrompts(prompts, open_prompts(prompts, teacher, encoding, obtain, "evaluation prompts"))

    def _images(self, kind: type[_T]) -> _T:
        source = Source("the student", self._run.student, None, "", self._run.latents, self._text)
        images = kind(source, self._seed, self._count, self._prompts, self._device, self._setting.protocol)
        images.shape = (_channels(self._run), self._run.image_size, self._run.image_size)
        return images

    def _measured(self, images: GeneratedImages) -> dict[str, float]:
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(cuda), warnings.catch_warnings():
            # That a small protocol is small need not be said each time.
            warnings.filterwarnings("ignore", message=".*scores carry the count in their names")
            scores = measure(images.views(self._setting.protocol), self._against, self._setting).scores
        return {_PREFIX + name: score.value for name, score in scores.items()}

    def _deciding(self, asked: str | None, scores: Iterable[str]) -> str:
        """The name, as records have it, of the score that says which student is best."""
        full = {_plain(name): name for name in scores}
        known = self._setting.protocol.names()
        listed = self._setting.metrics or self._setting.protocol.default
        measured = [name for one in listed for name in (one, *known[one].outputs) if name in full]
        decides = measured[0] if asked is None else asked
        directed = [name for name in dict.fromkeys(measured) if higher_is_better(name) is not None]
        if decides not in directed:
            raise ArgumentError(
                f"metric: got {decides!r}; expected one of what is measured and is better one way: "
                f"{', '.join(directed) or 'none here'}"
            )
        return full[decides]

    def describe(self) -> str:
        """What is measured, and what decides."""
        return (
            f"{self._count} images by protocol {self._setting.protocol.name}, "
            f"the best by {self._decides.removeprefix(_PREFIX)} kept in best/"
        )

    def scores(self) -> dict[str, float]:
        """Of the student's present weights, as entries of a record; the same on every process.

        Raises:
            NonFiniteError: an image is not finite.
        """
        return self._measured(self._images(_Samples))

    def is_best(self, scores: Mapping[str, float], earlier: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the deciding score is better than in each of a run's records."""
        sign = 1 if higher_is_better(_plain(self._decides)) else -1
        value = scores[self._decides]
        others = [record[self._decides] for record in earlier if self._decides in record]
        return not math.isnan(value) and all(math.isnan(other) or sign * value > sign * other for other in others)

    def reason(self, scores: Mapping[str, float]) -> str:
        """What a model card says of why this student was kept."""
        name, protocol = self._decides.removeprefix(_PREFIX), self._setting.protocol.name
        return (
            f"the best {name} so far, {scores[self._decides]:.6g} after {self._run.iteration} iterations "
            f"(protocol {protocol}, seed {self._seed})"
        )


def _plain(name: str) -> str:
    """fd_digits of "eval/fd_digits@100 vs photos"."""
    return name.removeprefix(_PREFIX).split(" ")[0].split("@")[0]


def _channels(run: Distillation) -> int:
    return run.networks.teacher.sample_shape[0] if run.latents is None else 3


def _prompts(config: DistillConfig, run: Distillation, protocol: Protocol, count: int) -> list[str] | None:
    """What the images are asked to be, in turn; None for a student that is told classes, or nothing."""
    given = config.eval.prompts
    if given is not None and (run.text is None or protocol.prompts is not None):
        reason = "this student is told none" if run.text is None else f"protocol {protocol.name!r} has its own"
        raise ArgumentError(f"prompts: got {given!r}, but {reason}; leave them out")
    if run.text is None:
        return None
    if given is None and protocol.prompts is None:
        raise ArgumentError(f"prompts: protocol {protocol.name!r} has none of its own; expected a file with one a line")
    prompts = read_prompts(Path(given)) if given is not None else []
    if protocol.prompts is not None:
        prompts = protocol.prompts()
    if protocol.asks_prompts and len(prompts) < count:
        raise ArgumentError(
            f"prompts: {len(prompts)} for {count} images, and protocol {protocol.name!r} draws each once"
        )
    return prompts[:count]

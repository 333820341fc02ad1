"""A run's student, measured while it learns: the averaged weights that are exported, by a small protocol."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evaluation.against import open_against
from evaluation.generated import GeneratedImages
from evaluation.measure import Setting, measure
from evaluation.protocols import get_protocol
from evaluation.score import higher_is_better
from evaluation.weights import parse_weights
from fdistill.build import Distillation
from fdistill.condition import TextCondition
from fdistill.config import DistillConfig
from fdistill.data.embeddings import EmbeddingSource
from fdistill.data.prompts import read_prompts
from fdistill.errors import ConfigError
from fdistill.generation import Source
from fdistill.run_text import encoded_prompts
from fdistill.teacher import Teacher
from fdistill.text import CutPrompt

_PREFIX = "eval/"


class StoredPrompts:
    """Prompts that were encoded before the run, in place of their encoders."""

    def __init__(self, prompts: Sequence[str], source: EmbeddingSource):
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


class Watch:
    """`config.eval`, ready to be asked for scores.

    Args:
        run: its student is measured as it is at the moment; the caller puts averaged weights into it.

    Raises:
        ConfigError, ArgumentError: a protocol, reference or metric that this run cannot be measured by.
    """

    def __init__(self, config: DistillConfig, run: Distillation, device: torch.device):
        section = config.eval
        protocol = get_protocol(section.protocol)
        self._run, self._device, self._seed = run, device, config.seed
        self._setting = Setting(
            protocol,
            device,
            section.metrics,
            section.batch_size,
            parse_weights(section.weights),
            replicates=0,
            progress=False,
        )
        self._against = open_against(protocol, section.reference)
        count = section.num_images or protocol.num_samples
        if count is None:
            raise ConfigError(f"eval.num_images: protocol {protocol.name!r} takes any number; say how many")
        self._count = count
        self._prompts, self._text = self._encoded(config)
        decides = section.metric or (section.metrics or protocol.default)[0]
        known = protocol.names()
        if decides not in (section.metrics or protocol.default) or decides not in known[decides].outputs:
            raise ConfigError(
                f"eval.metric: got {decides!r}; expected one of what is measured: "
                f"{', '.join(section.metrics or protocol.default)}"
            )
        self._decides = decides

    def _encoded(self, config: DistillConfig) -> tuple[list[str] | None, StoredPrompts | None]:
        if self._run.text is None:
            return None, None
        listed = self._setting.protocol.prompts
        if listed is None and config.eval.prompts is None:
            raise ConfigError(
                f"eval.prompts: protocol {self._setting.protocol.name!r} has none; expected a file of them"
            )
        prompts = read_prompts(Path(str(config.eval.prompts))) if listed is None else listed()
        run = self._run
        source = encoded_prompts(
            prompts,
            Teacher(run.checkpoint, run.networks.teacher, run.latents),
            negative_prompt=config.negative_prompt,
            precision=config.frozen_precision,
            device=self._device,
        )
        return prompts, StoredPrompts(prompts, source)

    def scores(self) -> dict[str, float]:
        """Of the student's present weights, as entries of a record; the same on every process."""
        run, protocol = self._run, self._setting.protocol
        source = Source("student", run.student, None, "", run.latents, self._text)
        images = GeneratedImages(source, self._seed, self._count, self._prompts, self._device, protocol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a small protocol is small need not be said each time
            measured = measure(images.views(protocol), self._against, self._setting)
        return {_PREFIX + name: score.value for name, score in measured.scores.items()}

    def is_best(self, scores: Mapping[str, float], earlier: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the deciding score is better than in each of a run's records."""
        name = next(name for name in scores if name.split(" ")[0].split("@")[0] == _PREFIX + self._decides)
        sign = 1 if higher_is_better(self._decides) else -1
        return all(sign * scores[name] > sign * record[name] for record in earlier if name in record)

"""Samples: images of a student, a teacher or a diffusers pipeline that are made when they are read."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.extractors import full_precision
from evaluation.images import Images
from evaluation.preparation import Preparation, prepared
from evaluation.protocols.protocol import Protocol
from fdistill.base.rng import Stream, derived_seed
from fdistill.generation.generate import labels_or_prompts
from fdistill.generation.maker import LabelsOrPrompts, Maker

_TIMED = 3  # batches that are timed, after a first one that warms up
_ENOUGH_SECONDS = 60.0  # no further batch is timed after this


class GeneratedImages:
    """`Images` of a maker. Image i depends on (seed, i) and its label or prompt alone, so it can be made again.

    Args:
        count: number of images.
        prompts: for a text-to-image model, in turn; None for models of classes and unconditional ones.
        protocol: says how images are prepared and whether labels are in turn or random.
    """

    def __init__(
        self,
        maker: Maker,
        seed: int,
        count: int,
        prompts: Sequence[str] | None,
        device: torch.device,
        protocol: Protocol,
    ):
        self.name, self.files, self.account = maker.name, None, None
        self._maker, self._seed, self._count, self._device = maker, seed, count, device
        self._preparation = Preparation(protocol.channels, protocol.recipe, protocol.size)
        self._last: dict[str, Any] = {}  # the batch made last, shared by all views
        condition = labels_or_prompts(maker, count, prompts=prompts if maker.takes_prompts else None)
        if isinstance(condition, Tensor) and protocol.random_labels:
            classes = maker.num_classes or 1
            draws = np.random.default_rng(derived_seed(seed, Stream.EVALUATED_LABELS)).random(count)
            condition = torch.from_numpy((draws * classes).astype(np.int64))
        self._condition: LabelsOrPrompts = condition
        self.labels = condition if isinstance(condition, Tensor) else None
        self.prompts: Sequence[str] | None = None if isinstance(condition, Tensor) else condition
        self.facts: dict[str, Any] = {
            "checkpoint": maker.name,
            "checkpoint_sha256": maker.weights_sha256,
            "kind": maker.kind,
            "sampler": maker.sampler,
            "guidance": maker.guidance_scale,
            "steps": maker.num_steps,
            "device": str(device),
        }
        if self.labels is not None:
            self.facts["classes"] = "random, by seed and number" if protocol.random_labels else "in turn"

    def __len__(self) -> int:
        return self._count

    def sha256(self) -> None:
        """None: images that are not made yet have no content to hash."""

    def views(self, protocol: Protocol) -> dict[str, Images]:
        """The samples in all views of the protocol. A batch that several views read in turn is made once."""
        views: dict[str, Images] = {"": self}
        for name, (recipe, size) in protocol.views.items():
            view = copy.copy(self)
            view._preparation = Preparation(protocol.channels, recipe, size)
            views[name] = view
        return views

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] on the CPU.

        Raises:
            DataError: the samples do not have the size or the channels that the protocol measures.
            NonFiniteError: a sample is not finite.
        """
        indices = list(indices)
        if self._last.get("indices") != indices:
            self._last.update(indices=indices, samples=self._sample(indices))
        return prepared(self._last["samples"], self.name, self._preparation)

    def _sample(self, indices: Sequence[int]) -> Tensor:
        condition = self._condition
        if isinstance(condition, Tensor):
            condition = condition[torch.as_tensor(indices)]
        elif condition is not None:
            condition = [condition[i] for i in indices]
        return self._maker.sample(self._seed, indices, condition, self._device)

    @contextmanager
    def measured(self, batch_size: int) -> Iterator[None]:
        """The block in which images are read. Inside it `facts` also have the resolution, and the evaluations and
        seconds for each image.

        The seconds are the median of up to three batches, which are made before the block begins, while nothing else
        runs.
        """
        maker = self._maker
        indices = range(min(batch_size, self._count))
        with maker.on(self._device), full_precision(self._device):  # as samples are made
            with maker.counted() as counted:
                first = self._sample(indices)
                counted.images = len(indices)
            seconds: list[float] = []
            while len(seconds) < _TIMED and sum(seconds) < _ENOUGH_SECONDS:
                before = time.perf_counter()
                self._sample(indices)
                seconds.append(time.perf_counter() - before)
            self.facts |= {
                "resolution": f"{first.shape[3]}x{first.shape[2]}",
                "evaluations_per_image": counted.per_image,
                "seconds_per_image": statistics.median(seconds) / len(indices),
                "timed_batch_size": len(indices),
            }
            yield

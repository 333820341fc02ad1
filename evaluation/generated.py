"""Images that are made when they are read: of a student, a teacher with its sampler, or any diffusers pipeline."""

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
from evaluation.images import Images, prepared
from evaluation.protocols.protocol import Protocol
from fdistill.base.rng import Stream, derived_seed
from fdistill.generation.generate import ImageSource, told_of
from fdistill.generation.maker import Told

_TIMED, _ENOUGH_SECONDS = 3, 60.0  # batches, after one that warms up; fewer where they take longer


class GeneratedImages:
    """Image i depends on (seed, i), and what it is asked to be, alone; so it can be made again when it is read again.

    Args:
        count: how many.
        prompts: what they are asked to be, in turn; None for a model that is told classes, or nothing.
        protocol: says how they are prepared.
    """

    def __init__(
        self,
        source: ImageSource,
        seed: int,
        count: int,
        prompts: Sequence[str] | None,
        device: torch.device,
        protocol: Protocol,
    ):
        self.name = source.name
        self._source, self._seed, self._count, self._device = source, seed, count, device
        self._channels, self._recipe, self._size = protocol.channels, protocol.recipe, protocol.size
        self._last: dict[str, Any] = {}  # shared among views
        self._told: Told = told_of(source, count, prompts=prompts if source.takes_prompts else None)
        if isinstance(self._told, Tensor) and protocol.random_labels:
            classes = source.num_classes or 1
            draws = np.random.default_rng(derived_seed(seed, Stream.EVALUATED_LABELS)).random(count)
            self._told = torch.from_numpy((draws * classes).astype(np.int64))
        self.labels = self._told if isinstance(self._told, Tensor) else None
        self.prompts: Sequence[str] | None = None if isinstance(self._told, Tensor) else self._told
        self.facts: dict[str, Any] = {
            "checkpoint": source.name,
            "checkpoint_sha256": source.weights_sha256,
            "kind": source.kind,
            "sampler": source.sampler,
            "guidance": source.guidance_scale,
            "steps": source.num_steps,
            "device": str(device),
        }
        if self.labels is not None:
            self.facts["classes"] = "random, by seed and number" if protocol.random_labels else "in turn"

    def __len__(self) -> int:
        return self._count

    def sha256(self) -> None:
        """None: what is not made yet has no content."""

    def views(self, protocol: Protocol) -> dict[str, Images]:
        """The samples as the protocol's views want them; what is read of several, batch by batch, is made once."""
        views: dict[str, Images] = {"": self}
        for name, (recipe, size) in protocol.views.items():
            view = copy.copy(self)
            view._recipe, view._size = recipe, size
            views[name] = view
        return views

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]."""
        indices = list(indices)
        if self._last.get("indices") != indices:
            self._last.update(indices=indices, samples=self._sample(indices))
        return prepared(self._last["samples"], self.name, channels=self._channels, recipe=self._recipe, size=self._size)

    def _sample(self, indices: Sequence[int]) -> Tensor:
        told: Told = self._told
        if isinstance(told, Tensor):
            told = told[torch.as_tensor(indices)]
        elif told is not None:
            told = [told[i] for i in indices]
        return self._source.sample(self._seed, indices, told, self._device)

    @contextmanager
    def measured(self, batch_size: int) -> Iterator[None]:
        """Reading inside the block, where `facts` say what size images are made in, evaluations and seconds an image.

        Seconds are the median of a few batches made before the block, with nothing else running.
        """
        source = self._source
        indices = range(min(batch_size, self._count))
        with source.on(self._device), full_precision(self._device):  # as samples are made
            with source.counted() as counted:
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

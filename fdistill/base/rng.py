"""Random draws that depend only on the seed and the sample, not on batch splits, process counts or earlier runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["indexed_normal", "normal", "uniform"]


class Stream(IntEnum):
    """What a seed's random numbers are used for. Each use has a stream of its own, so that its draws do not depend on
    those of the others. The numbers stay as they are: a changed one would change what a seed gives.
    """

    PIPELINE = 0  #: the torch.Generator that a diffusers pipeline is given
    SHUFFLE = 1  #: the order of a data set
    PIPELINE_GLOBAL = 1  #: torch's global generator while a pipeline runs; a data set's order never meets it
    STEP = 2  #: noise and levels of an iteration's updates
    DROPOUT = 3  #: dropout of layers in an iteration; differs between processes
    STUDENT_STEP = 4  #: which of a few-step student's steps is trained
    FLIP = 5  #: which images are mirrored
    LATENT = 6  #: latents drawn from their moments
    NO_CONDITION = 7  #: which samples the critic sees without their condition
    EVALUATED_LABELS = 11  #: classes of generated images, where a protocol draws them
    GROUP = 12  #: which aspect-ratio bucket a batch is of
    GROUP_ORDER = 13  #: the order within a bucket


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


_PART: ContextVar[tuple[int, int]] = ContextVar("part", default=(0, 1))


@contextmanager
def part(number: int, count: int) -> Iterator[None]:
    """Inside the block, draws are for part `number` of `count` equal parts of this process's batch.

    Every part must begin with a generator in the same state. It then gets its rows of the same draws that the whole
    batch would get.
    """
    token = _PART.set((number, count))
    try:
        yield
    finally:
        _PART.reset(token)


def share() -> tuple[int, int]:
    """(place, number of places): which of the equal shares of the global batch is drawn for. A share is a process's
    batch, or a part of it; (0, 1) where there is one process, and no `part`.
    """
    rank, processes = world()
    number, count = _PART.get()
    return rank * count + number, processes * count


def normal(generator: torch.Generator, batch: int, shape: Sequence[int]) -> Tensor:
    """Standard normal [batch, *shape] float32 on the generator's device: this share's rows of one global draw.

    Every process must have a generator in the same state and draw the same number of rows. Drawing the global batch
    everywhere costs little beside a network evaluation, and N processes then see the same samples as one would.
    """
    place, places = share()
    draw = torch.randn(places * batch, *shape, generator=generator, device=generator.device)
    return draw[place * batch : (place + 1) * batch]


def uniform(generator: torch.Generator, batch: int) -> Tensor:
    """Uniform [0, 1) [batch] float32; shared between processes as in `normal`."""
    place, places = share()
    draw = torch.rand(places * batch, generator=generator, device=generator.device)
    return draw[place * batch : (place + 1) * batch]


def device_seed(generator: torch.Generator) -> Tensor:
    """A 0-d int64 seed on the generator's device, for noise that is drawn there; the CPU never reads it."""
    return torch.randint(2**63 - 1, (), generator=generator, device=generator.device)


def derived_seed(seed: int, *stream: int) -> int:
    """A seed in [0, 2^63) for one stream of a run, such as (Stream.STEP, iteration); no random state is stored."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def indexed_normal(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal [len(indices), *shape] float32 on the CPU; row k depends on (seed, indices[k]) alone.

    One Philox stream per sample (Salmon et al. 2011), keyed by seed and index, so no two samples share numbers.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64))).standard_normal(
            tuple(shape), dtype=np.float32
        )
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows))

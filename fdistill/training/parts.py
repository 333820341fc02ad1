"""Updates of a batch in parts, one after another, so that a large batch fits a small memory (gradient accumulation).

A part is drawn as if another process had it (`rng.part`), its loss is divided by the number of parts, and gradients add
up until the optimiser's step. The update is that of the whole batch, up to rounding, except where a step compares the
samples of a batch: the density ratio's bins and mean, generator.gan_gradient_ratio and reward.gradient_ratio are those
of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fdistill.base import rng
from fdistill.base.devices import autocast
from fdistill.base.errors import ConfigError
from fdistill.condition import TextCondition
from fdistill.config.schema import DistillConfig
from fdistill.rollout import Rollout
from fdistill.step import Networks, Pairs, PerSample
from fdistill.training.sharding import average_gradients_next
from fdistill.training.updates import Update

#: The sections that have a micro_batch: the student's update, and the critic's.
SECTIONS = ("generator", "fake_score")


@dataclass(frozen=True)
class ImageLoss:
    """A loss of samples, each compared with features of its own prompt.

    Attributes:
        loss: (x0 [B, C, H, W], features [B, D]) -> [B].
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    features: Tensor

    def __call__(self, x0: Tensor) -> Tensor:
        return self.loss(x0, self.features)

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: slice) -> ImageLoss:
        """The same for some of the samples."""
        return ImageLoss(self.loss, self.features[rows])


@dataclass(frozen=True)
class Split:
    """How an update is computed.

    Attributes:
        count: the number of parts; 1 is the whole batch at once.
        precision: "fp32" or "bf16", as for `autocast`.
        trained: the modules that get gradients, averaged over processes in the last part alone.
    """

    count: int
    precision: str
    trained: Sequence[nn.Module] = ()


def count_of(config: DistillConfig, section: str, processes: int) -> int:
    """The number of parts that a section's micro_batch divides a process's batch into.

    Raises:
        ConfigError: it does not divide that batch.
    """
    size: int | None = getattr(config, section).micro_batch
    local = config.batch_size // processes
    if size is None or size >= local:
        return 1
    if local % size:
        raise ConfigError(
            f"{section}.micro_batch: got {size}, which does not divide the {local} samples of a process; expected a "
            "divisor, or null for all at once"
        )
    return local // size


def check_parts(config: DistillConfig, processes: int) -> None:
    """Raises ConfigError where a stage's micro_batch does not divide a process's batch."""
    for stage in config.stage_configs():
        for section in SECTIONS:
            count_of(stage, section, processes)


def backward(
    update: Update, arguments: Mapping[str, Any], generator: torch.Generator, split: Split
) -> list[Mapping[str, PerSample]]:
    """Runs an update and the backward pass of its mean loss; returns the logs of each part.

    If the loss is NaN or infinite, every gradient becomes NaN.

    Args:
        arguments: of the update, for the whole batch of this process, except the random generator.
        generator: in the state that the update starts from; afterwards in the state that it leaves.
    """
    state = generator.get_state() if split.count > 1 else None
    logs: list[Mapping[str, PerSample]] = []
    for number in range(split.count):
        if state is not None:
            generator.set_state(state)
        with rng.part(number, split.count), autocast(generator.device, split.precision):
            result = update(generator=generator, **part_of(arguments, number, split.count))
        average_gradients_next(split.trained, number == split.count - 1)
        loss = result.loss / split.count if split.count > 1 else result.loss
        loss.backward(0 * loss.detach() + 1)  # NaN if the loss is not finite, so that no gradient is
        logs.append(result.logs)
    return logs


@torch.no_grad()
def draw_samples(networks: Networks, arguments: Mapping[str, Any], generator: torch.Generator, split: Split) -> Tensor:
    """The student's samples [B, C, H, W] that a critic's update with these arguments would draw, in as many parts."""
    state, parts = generator.get_state(), []
    for number in range(split.count):
        generator.set_state(state)
        own = part_of(arguments, number, split.count)
        with rng.part(number, split.count), autocast(generator.device, split.precision):
            drawn = networks.draw_samples(generator, len(own["real_x0"]), own["condition"], own.get("rollout"))
        parts.append(drawn)
    return parts[0] if split.count == 1 else torch.cat(parts)


def part_of(arguments: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    """The arguments for part `number` of `count`: the same share of everything that has a row for each sample."""
    if count == 1:
        return dict(arguments)
    found = {key: _rows(value, number, count) for key, value in arguments.items()}
    if "batch_size" in found:
        found["batch_size"] //= count
    return found


def _rows(value: Any, number: int, count: int) -> Any:
    if isinstance(value, Pairs):
        return Pairs(*(_rows(each, number, count) for each in value))
    if isinstance(value, Rollout):
        return value if value.x0 is None else replace(value, x0=_rows(value.x0, number, count))
    if isinstance(value, Tensor | TextCondition | ImageLoss):
        size = len(value) // count
        rows = slice(number * size, (number + 1) * size)
        return value[rows] if isinstance(value, Tensor) else value.rows(rows)
    return value


def describe(config: DistillConfig, processes: int) -> Sequence[str]:
    """A phrase for each section whose updates are computed in parts."""
    counts = {section: count_of(config, section, processes) for section in SECTIONS}
    return [
        f"{section}: {count} parts of {config.batch_size // processes // count} samples"
        for section, count in counts.items()
        if count > 1
    ]

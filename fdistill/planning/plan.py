"""A plan: memory, disk and time of a config's run on some GPUs, and settings that make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fdistill.base.errors import ConfigError
from fdistill.config.schema import DistillConfig
from fdistill.planning.disk import Stored, stored
from fdistill.planning.placement import Device, Footprint, Placement, footprint, on_a_device, placement_of
from fdistill.planning.rates import Rates, Seconds, Traffic, flops, seconds, traffic
from fdistill.planning.remedies import Remedy, remedies
from fdistill.planning.weightless import open_without_weights, run_without_weights, unread
from fdistill.training.parts import check_parts

COUNTS = tuple(2**power for power in range(10))  # 1 to 512 GPUs


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a run is planned for.

    Attributes:
        gpus: how many.
        machine: how many in a machine.
        memory: bytes that a run may take on one; None if that is not asked for.
        rates: what they do.
    """

    gpus: int
    machine: int
    memory: int | None
    rates: Rates


@dataclass(frozen=True)
class Scaled:
    """The run on another number of GPUs.

    Attributes:
        samples: of a GPU, of the config's batch; None where it does not divide among them.
        device: what a GPU holds, under `samples`.
        time: of an iteration, under `samples`.
        grown: of an iteration if the batch grows with the GPUs, each having as many samples as in the plan.
    """

    gpus: int
    samples: int | None
    device: Device | None
    time: Seconds | None
    grown: Seconds


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        samples: of a GPU in an iteration.
        placed: how the run is spread.
        found: the run as it was counted.
        device: what a GPU holds.
        disk: what is kept there.
        flops: of a GPU in an iteration.
        sent: bytes that a GPU sends for each role in an iteration.
        time: of an iteration.
        table: the same run on 1 to 512 GPUs.
        remedies: settings that make it fit; None if it fits, or no memory was given.
        notes: what was assumed because it is not read.
    """

    config: DistillConfig
    hardware: Hardware
    samples: int
    placed: Placement
    found: Footprint
    device: Device
    disk: list[Stored]
    flops: float
    sent: list[Traffic]
    time: Seconds
    table: list[Scaled]
    remedies: list[Remedy] | None
    notes: list[str]


def make_plan(config: DistillConfig, hardware: Hardware, say: Callable[[str], None]) -> Plan:
    """Counts a config's run on tensors without values. Reads configs of the teacher, and no weights.

    Args:
        say: told what is being counted, since it may take minutes.

    Raises:
        ConfigError: the batch does not divide among the GPUs, or settings do not fit the teacher.
        CheckpointError: the teacher's configs are not there.
    """
    gpus = hardware.gpus
    if config.batch_size % gpus:
        raise ConfigError(f"batch_size: {config.batch_size} does not divide among {gpus} GPUs")
    check_parts(config, gpus)
    placed = placement_of(config, gpus, hardware.machine)
    if gpus % placed.shards:
        raise ConfigError(
            f"parallel: hybrid needs whole machines of {hardware.machine} GPUs, got {gpus}; expected a multiple, or "
            "another --gpus-per-machine"
        )
    teacher = open_without_weights(config)

    def count(changed: DistillConfig) -> Footprint:
        say(f"counting an iteration of {changed.teacher}{_what(config, changed)}")
        return footprint(run_without_weights(changed, open_without_weights(changed)), gpus)

    found = count(config)
    device = on_a_device(found, placed)
    helping = None
    if hardware.memory is not None and device.total > hardware.memory:
        helping = remedies(config, placed, hardware.memory, found, count)
    return Plan(
        config,
        hardware,
        config.batch_size // gpus,
        placed,
        found,
        device,
        stored(config, teacher, on_a_device(found, replace(placed, gpus=1)).saved),
        flops(found.updates),
        traffic(found, placed),
        seconds(found, placed, hardware.rates),
        [_scaled(config, found, placed, number, hardware.rates) for number in COUNTS],
        helping,
        unread(config),
    )


def _what(config: DistillConfig, changed: DistillConfig) -> str:
    """The settings of `changed` that are not the config's, in words."""
    differing = [
        words
        for words, differs in (
            ("gradient checkpointing", changed.gradient_checkpointing != config.gradient_checkpointing),
            ("bf16", changed.precision != config.precision),
            ("LoRA", changed.student.lora_rank != config.student.lora_rank),
        )
        if differs
    ]
    return f" with {', '.join(differing)}" if differing else ""


def _scaled(config: DistillConfig, found: Footprint, placed: Placement, gpus: int, rates: Rates) -> Scaled:
    """The run on this number of GPUs. Activations and operations are in proportion to the samples."""
    moved = replace(placed, gpus=gpus)
    grown = seconds(found, moved, rates)
    if config.batch_size % gpus:
        return Scaled(gpus, None, None, None, grown)
    samples = config.batch_size // gpus
    scales = {
        name: min(samples, update.samples if update.parts > 1 else samples) / update.samples
        for name, update in found.updates.items()
    }
    time = seconds(found, moved, rates, samples * placed.gpus / config.batch_size)
    return Scaled(gpus, samples, on_a_device(found, moved, scales), time, grown)

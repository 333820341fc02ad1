"""What a GPU holds of a run, by how the run is spread: whole copies, shards, or the CPU's memory.

Weights, gradients, optimiser and averages are divided as torch's FSDP2 divides them. While a block runs, its weights
and those of the next one are whole, and so are its gradients before they are reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from fdistill.config.schema import DistillConfig
from fdistill.planning.blocks import Blocks, gathers, measure_blocks
from fdistill.planning.counting import Counted, count_updates
from fdistill.planning.held import NAMES, Row, frozen_network, rows
from fdistill.training.distillation import Distillation

#: Bytes of a weight that is stored in 8 or 4 bits, with its part of a scale in float32.
STORED = {"int8": 1 + 4 / 256, "fp8": 1 + 4 / 256, "nf4": 0.5 + 4 / 64}
#: Bytes of both moments of a parameter in 8 bits, with its part of their scales in float32.
_MOMENTS_8BIT = 2 * (1 + 4 / 256)
FROZEN_ROLES = ("teacher", "guide")


@dataclass(frozen=True)
class Footprint:
    """A run as it is counted, on one GPU that holds everything.

    Attributes:
        rows: what roles hold.
        updates: the critic's and the student's.
        blocks: role -> the sizes of its network's blocks.
        gathers: update -> role -> how often its weights are gathered in one of these updates.
        storable: elements of the frozen network's layers that may be stored in 8 or 4 bits.
        compute_bytes: of a weight in the precision that networks compute in.
        frozen_bytes: of a frozen weight.
    """

    rows: tuple[Row, ...]
    updates: Mapping[str, Counted]
    blocks: Mapping[str, Blocks]
    gathers: Mapping[str, Mapping[str, float]]
    storable: int
    compute_bytes: int
    frozen_bytes: int


@dataclass(frozen=True)
class Placement:
    """How a run is spread. The fields are settings of a run, except the first two.

    Attributes:
        gpus: how many there are.
        machine: how many a machine has.
        optimizer: "adamw", or anything else for moments in 8 bits.
    """

    gpus: int
    machine: int = 8
    parallel: str = "ddp"
    offload_frozen: bool = False
    offload_optimizers: bool = False
    frozen_precision: str = "fp32"
    optimizer: str = "adamw"

    @property
    def shards(self) -> int:
        """Among how many GPUs weights are divided."""
        return {"ddp": 1, "fsdp": self.gpus, "hybrid": min(self.machine, self.gpus)}[self.parallel]


@dataclass(frozen=True)
class Device:
    """Bytes on one GPU.

    Attributes:
        rows: what is left of each role there.
        gathered: weights and gradients of the blocks that run.
        gradients: update -> of gradients at its peak.
        activations: update -> of activations, and of what is made in between, at its peak.
        host: what this GPU's process has in the CPU's memory instead.
    """

    rows: tuple[Row, ...]
    gathered: int
    gradients: Mapping[str, int]
    activations: Mapping[str, int]
    host: int

    @property
    def held(self) -> int:
        """Weights, optimiser and averages."""
        return sum(row.total - row.gradients for row in self.rows)

    @property
    def total(self) -> int:
        """At the peak of an iteration."""
        return self.held + self.gathered + max(self.gradients[name] + self.activations[name] for name in self.gradients)


def footprint(run: Distillation, processes: int) -> Footprint:
    """Counts a run without values, see `count_updates`; a batch is divided among the processes."""
    teacher = frozen_network(run)
    networks: dict[str, nn.Module] = {"teacher": teacher}
    if run.guide is not None:
        networks["guide"] = run.guide.denoiser
    networks |= {NAMES[role]: run.role(role) for role in run.optimizers if role != "discriminator"}
    with gathers(networks) as counted:
        before = dict(counted)
        updates, passes = {}, {}
        for name, update in count_updates(run, processes):
            parts = min(update.parts, 2)
            passes[name] = {role: (counted[role] - before[role]) * update.parts / parts for role in counted}
            updates[name], before = update, dict(counted)
    return Footprint(
        tuple(rows(run)),
        updates,
        {role: measure_blocks(network) for role, network in networks.items()},
        passes,
        sum(weight.numel() for weight in _storable(teacher)),
        2 if run.config.precision == "bf16" else 4,
        2 if run.config.frozen_precision != "fp32" else 4,
    )


def _storable(network: nn.Module) -> list[nn.Parameter]:
    """Weights of the plain linear and convolutional layers in a network's blocks."""
    layers = [
        module
        for name, module in network.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
        and any(part.endswith("blocks") or part == "mid_block" for part in name.split("."))
    ]
    return [layer.weight for layer in layers if isinstance(layer.weight, nn.Parameter)]


def on_a_device(
    found: Footprint, placed: Placement, scales: Mapping[str, float] | None = None, *, in_parts: bool = False
) -> Device:
    """What one of the GPUs holds.

    Args:
        scales: update -> how many times the counted samples one of its parts has; 1 by default.
        in_parts: whether updates that were counted as a whole are computed in parts.
    """
    scales = scales or {}
    divided = [_divided(row, found, placed) for row in found.rows]
    on_host = [row for row in divided if _is_offloaded(row, placed)]
    left = [row for row in divided if not _is_offloaded(row, placed)]
    sharded = placed.shards > 1
    kept = 0.0 if placed.offload_optimizers else 1 / placed.shards
    peaks = {
        name: update.peak(gradients=kept, casts=not sharded, scale=scales.get(name, 1.0), accumulates=in_parts)
        for name, update in found.updates.items()
    }
    return Device(
        tuple(left),
        _gathered(found, placed),
        {name: gradient for name, (gradient, _) in peaks.items()},
        {name: other for name, (_, other) in peaks.items()},
        sum(row.total for row in on_host),
    )


def _is_offloaded(row: Row, placed: Placement) -> bool:
    return placed.offload_frozen if row.role in FROZEN_ROLES else placed.offload_optimizers


def _divided(row: Row, found: Footprint, placed: Placement) -> Row:
    weights = float(row.weights)
    if row.role == "teacher" and placed.frozen_precision in STORED:
        weights -= found.storable * (found.frozen_bytes - STORED[placed.frozen_precision])
    optimizer = row.optimizer if placed.optimizer == "adamw" else row.trained * _MOMENTS_8BIT
    shards = placed.shards
    return replace(
        row,
        weights=int(weights / shards),
        gradients=row.gradients // shards,
        optimizer=int(optimizer / shards),
        averages=row.averages // shards,
    )


def _gathered(found: Footprint, placed: Placement) -> int:
    """Bytes of two blocks in the precision that networks compute in, of one block's gradients in float32, and of what
    is in no block, for all networks that are not whole on the GPU.
    """
    roles = [role for role in found.blocks if _is_gathered(role, placed)]
    if not roles:
        return 0
    largest = max(found.blocks[role].largest for role in roles)
    sizes = {role: found.blocks[role] for role in roles}
    reduced = max(
        row.trained * sizes[row.role].largest // (sizes[row.role].inside + sizes[row.role].outside)
        for row in found.rows
        if row.role in sizes
    )
    outside = sum(found.blocks[role].outside * (found.frozen_bytes if role in FROZEN_ROLES else 4) for role in roles)
    return 2 * largest * found.compute_bytes + 4 * reduced + outside


def _is_gathered(role: str, placed: Placement) -> bool:
    offloaded = placed.offload_frozen if role in FROZEN_ROLES else placed.offload_optimizers
    return placed.shards > 1 or offloaded


def placement_of(config: DistillConfig, gpus: int, machine: int) -> Placement:
    """How a config spreads its run; settings that it does not have are as if it had their defaults."""
    default = Placement(gpus, machine)
    return Placement(
        gpus,
        machine,
        getattr(config, "parallel", default.parallel),
        getattr(config, "offload_frozen", default.offload_frozen),
        getattr(config, "offload_optimizers", default.offload_optimizers),
        config.frozen_precision,
        getattr(config.generator, "optimizer", default.optimizer),
    )

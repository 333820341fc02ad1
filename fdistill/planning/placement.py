"""What a GPU holds of a run, by how the run is spread: whole copies, shards, or the CPU's memory.

Weights, gradients, optimiser and averages are divided as `training.sharding` divides them, by torch's FSDP2. Whatever
is distributed, in shards, among copies or into the CPU's memory, is copied to run: the weights of a block and of the
next one, and the block's gradients before they are reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from fdistill.config.schema import DistillConfig
from fdistill.planning.counting import LEARN, Counted, count_updates
from fdistill.planning.gathers import Blocks, Network, gathers, measure
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
        networks: role -> the sizes of its network.
        gathers: update -> role -> how often its weights are gathered in one of these updates.
        storable: elements of the frozen network's layers that may be stored in 8 or 4 bits.
        compute_bytes: of a weight in the precision that networks compute in.
        frozen_bytes: of a frozen weight.
    """

    rows: tuple[Row, ...]
    updates: Mapping[str, Counted]
    networks: Mapping[str, Network]
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
        saved: what it copies there for a checkpoint, which is written while training goes on.
    """

    rows: tuple[Row, ...]
    gathered: int
    gradients: Mapping[str, int]
    activations: Mapping[str, int]
    host: int
    saved: int

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
    networks |= {NAMES[role]: run.role(role) for role in run.optimizers}
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
        {role: measure(network) for role, network in networks.items()},
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
    on_host = [row for row in divided if _is_offloaded(row.role, found, placed)]
    left = [row for row in divided if not _is_offloaded(row.role, found, placed)]
    gradients, activations = {}, {}
    for name, update in found.updates.items():
        gradients[name], activations[name] = update.peak(
            gradients=_kept(name, found, placed, in_parts=in_parts or update.parts > 1),
            casts=placed.shards == 1,
            scale=scales.get(name, 1.0),
            accumulates=in_parts,
        )
    trained = [row for row in divided if row.trained]
    saved = sum(row.gradients + row.optimizer + row.averages for row in trained)  # weights are as large as gradients
    return Device(
        tuple(left), _gathered(found, placed), gradients, activations, sum(row.total for row in on_host), saved
    )


def _is_distributed(role: str, placed: Placement) -> bool:
    """Whether FSDP2 has some of its weights."""
    if role in FROZEN_ROLES:
        return _shares_frozen(placed)
    return placed.gpus > 1 or placed.offload_frozen or placed.offload_optimizers


def _shares_frozen(placed: Placement) -> bool:
    """Whether FSDP2 has the weights that are not trained."""
    return placed.shards > 1 or placed.offload_frozen


def _is_offloaded(role: str, found: Footprint, placed: Placement) -> bool:
    if role in FROZEN_ROLES:
        return placed.offload_frozen
    return placed.offload_optimizers or (placed.offload_frozen and found.networks[role].adapters)


def _kept(update: str, found: Footprint, placed: Placement, *, in_parts: bool) -> float:
    """Of an update's gradients, the share on the GPU when the update is done. Between parts FSDP2 has them whole."""
    rows = [row for row in found.rows if row.role in LEARN[update]]
    if in_parts:
        return 1.0
    kept = [0 if _is_offloaded(row.role, found, placed) else row.gradients * _share(row, found, placed) for row in rows]
    return sum(kept) / max(1, sum(row.gradients for row in rows))


def _share(row: Row, found: Footprint, placed: Placement) -> float:
    """What the GPU with the most has of a role."""
    network = found.networks[row.role]
    return (network.trained if row.trained else network.weights).share(placed.shards)


def _divided(row: Row, found: Footprint, placed: Placement) -> Row:
    weights = float(row.weights)
    if row.role == "teacher" and placed.frozen_precision in STORED:
        weights -= found.storable * (found.frozen_bytes - STORED[placed.frozen_precision])
    optimizer = row.optimizer if placed.optimizer == "adamw" else row.trained * _MOMENTS_8BIT
    share = _share(row, found, placed)
    return replace(
        row,
        weights=int(weights * share),
        gradients=int(row.gradients * share),
        optimizer=int(optimizer * share),
        averages=int(row.averages * share),
    )


def _gathered(found: Footprint, placed: Placement) -> int:
    """Bytes of the two largest copies of blocks, of a block's gradients before and after they are put together to be
    reduced, and of what is in no block of the two networks that a backward pass goes through at once, the heads and
    the network that they read.
    """
    roles = [role for role in found.networks if _is_distributed(role, placed)]
    if not roles:
        return 0
    stored = {role: found.frozen_bytes if role in FROZEN_ROLES else 4 for role in roles}
    width = {role: found.compute_bytes if placed.shards > 1 else stored[role] for role in roles}
    copied = {role: _copied(found.networks[role], placed) for role in roles}
    running = max(2 * copied[role].largest * width[role] for role in roles)
    reduced = max(found.networks[role].trained.largest * (width[role] + 4) for role in roles)
    outside = sorted(copied[role].outside * stored[role] for role in roles)
    return running + reduced + sum(outside[-2:])


def _copied(network: Network, placed: Placement) -> Blocks:
    return network.weights if _shares_frozen(placed) else network.trained


def placement_of(config: DistillConfig, gpus: int, machine: int) -> Placement:
    """How a config spreads its run."""
    return Placement(
        gpus,
        machine,
        config.parallel,
        config.offload_frozen,
        config.offload_optimizers,
        config.frozen_precision,
        optimizer_of(config),
    )


def optimizer_of(config: DistillConfig) -> str:
    """The optimiser of the student, and so of all roles."""
    return getattr(config.generator, "optimizer", "adamw")  # a setting that this version does not have yet

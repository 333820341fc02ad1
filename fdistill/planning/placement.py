"""What a GPU holds of a run, by how the run is spread: whole copies, shards, or the CPU's memory.

Weights, gradients, optimiser and averages are divided as `training.sharding` divides them, by torch's FSDP2. Whatever
is distributed, in shards, among copies or into the CPU's memory, is copied to run: the weights of a block and of the
next one, and the block's gradients before they are reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fdistill.adapters.quantised_layers import KINDS, quantised_names
from fdistill.config.schema import DistillConfig
from fdistill.planning.counting import LEARN, Counted, count_updates
from fdistill.planning.gathers import Blocks, Network, gathers, measure
from fdistill.planning.held import NAMES, Row, frozen_network, moments, rows
from fdistill.training.distillation import Distillation

#: Bytes of a weight that is stored in 8 or 4 bits, with its part of a scale in float32.
STORED = {name: (0.5 if name == "nf4" else 1) + 4 / kind.block for name, kind in KINDS.items()}
FROZEN_ROLES = ("teacher", "guide")


@dataclass(frozen=True)
class Footprint:
    """A run as it is counted, on one GPU that holds everything.

    Attributes:
        rows: what roles hold.
        updates: the critic's and the student's.
        networks: role -> the sizes of its network.
        gathers: update -> role -> how often its weights are gathered in one of these updates.
        storable: frozen role -> elements of its network's layers that may be stored in 8 or 4 bits.
        moments_8bit: trained role -> bytes of its moments where these are stored in 8 bits.
        compute_bytes: of a weight in the precision that networks compute in.
        frozen_bytes: of a frozen weight.
    """

    rows: tuple[Row, ...]
    updates: Mapping[str, Counted]
    networks: Mapping[str, Network]
    gathers: Mapping[str, Mapping[str, float]]
    storable: Mapping[str, int]
    moments_8bit: Mapping[str, int]
    compute_bytes: int
    frozen_bytes: int


@dataclass(frozen=True)
class Placement:
    """How a run is spread. The fields are settings of a run, except the first two.

    Attributes:
        gpus: how many there are.
        machine: how many a machine has.
        moments_8bit: trained roles whose moments are stored in 8 bits.
    """

    gpus: int
    machine: int = 8
    parallel: str = "ddp"
    offload_frozen: bool = False
    offload_optimizers: bool = False
    frozen_precision: str = "fp32"
    moments_8bit: tuple[str, ...] = ()

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
        {role: _storable(network) for role, network in networks.items() if role in FROZEN_ROLES},
        {NAMES[role]: moments(_trained(run.role(role)), "adamw-8bit") for role in run.optimizers},
        2 if run.config.precision == "bf16" else 4,
        2 if run.config.frozen_precision != "fp32" else 4,
    )


def _storable(network: nn.Module) -> int:
    layers: list[Any] = [network.get_submodule(name) for name in quantised_names(network)]
    return sum(layer.weight.numel() for layer in layers)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


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
    if row.role in FROZEN_ROLES and placed.frozen_precision in STORED:
        weights -= found.storable[row.role] * (found.frozen_bytes - STORED[placed.frozen_precision])
    optimizer = found.moments_8bit[row.role] if row.role in placed.moments_8bit else row.optimizer
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
        tuple(NAMES[role] for role, section in config.roles.items() if section.optimizer == "adamw-8bit"),
    )

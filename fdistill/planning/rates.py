"""Seconds of an iteration from stated rates: operations over a matrix rate, bytes over the speed of links.

Of N GPUs that share a collective, each sends (N - 1) / N of the bytes in an all-gather or a reduce-scatter, and twice
as many in an all-reduce, which is both in a ring. Where rows of weights do not divide among N, shards are filled up to
the largest. A ring is as fast as its slowest link. Latencies are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fdistill.planning.counting import LEARN, Counted
from fdistill.planning.placement import FROZEN_ROLES, Footprint, Placement


@dataclass(frozen=True)
class Rates:
    """What hardware does.

    Attributes:
        tflops: 1e12 floating-point operations per second that a GPU reaches in these networks.
        link: GB/s that a GPU sends within its machine.
        network: GB/s that a GPU sends to other machines.
        seconds: measured of one iteration of one GPU with the samples that were counted; None counts operations.
    """

    tflops: float
    link: float
    network: float
    seconds: float | None = None


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends for a role in an iteration.

    Attributes:
        inside, between: within its machine, and through the network. A ring over several machines is as slow as the
            network, and all of its bytes count as the network's.
    """

    role: str
    inside: float
    between: float


@dataclass(frozen=True)
class Seconds:
    """Of one iteration.

    Attributes:
        compute: of operations, or as measured.
        communication: of collectives.
    """

    compute: float
    communication: float

    @property
    def overlapped(self) -> float:
        """If communication runs beside computation wherever it can."""
        return max(self.compute, self.communication)

    @property
    def apart(self) -> float:
        """If one waits for the other."""
        return self.compute + self.communication


def traffic(found: Footprint, placed: Placement) -> list[Traffic]:
    """For each role: gradients that are reduced, and weights that are gathered if they are sharded."""
    return [_of_role(row.role, row.gradients, found, placed) for row in found.rows]


def _of_role(role: str, gradients: int, found: Footprint, placed: Placement) -> Traffic:
    shards, copies = placed.shards, placed.gpus // placed.shards
    network = found.networks[role]
    times = sum(update.times for name, update in found.updates.items() if role in LEARN[name])
    among_shards = 0.0
    if shards > 1:
        outside = found.frozen_bytes if role in FROZEN_ROLES else 4
        once = network.weights.inside * found.compute_bytes + network.weights.outside * outside
        gathered = once * sum(found.gathers[name][role] * update.times for name, update in found.updates.items())
        among_shards = (shards - 1) * (
            network.weights.share(shards) * gathered + network.trained.share(shards) * gradients * times
        )
    among_copies = 2 * (copies - 1) / copies * gradients * times * network.trained.share(shards)
    crosses = shards > placed.machine
    inside, between = (0.0, among_shards) if crosses else (among_shards, 0.0)
    if placed.gpus > placed.machine:
        return Traffic(role, inside, between + among_copies)
    return Traffic(role, inside + among_copies, between)


def seconds(found: Footprint, placed: Placement, rates: Rates, scale: float = 1.0) -> Seconds:
    """Of an iteration.

    Args:
        scale: how many times the counted samples a GPU has.
    """
    sent = traffic(found, placed)
    inside, between = sum(each.inside for each in sent) / 1e9, sum(each.between for each in sent) / 1e9
    compute = flops(found.updates) / 1e12 / rates.tflops if rates.seconds is None else rates.seconds
    return Seconds(scale * compute, inside / rates.link + between / rates.network)


def flops(updates: Mapping[str, Counted]) -> float:
    """Operations of an iteration of one GPU."""
    return float(sum(update.flops * update.times for update in updates.values()))

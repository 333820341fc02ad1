"""Bytes that roles hold from the first iteration to the last: weights, gradients, optimiser and averages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from fdistill.denoiser import Denoiser
from fdistill.ema import trained_state
from fdistill.guidance import GuidedDenoiser
from fdistill.step import ROLES
from fdistill.training.adamw_8bit import state_bytes
from fdistill.training.distillation import Distillation

#: Role of `Networks` -> what people read.
NAMES = {"generator": "student", "fake_score": "fake score", "discriminator": "heads"}


@dataclass(frozen=True)
class Row:
    """What one role holds, in bytes.

    Attributes:
        trained: parameters that an optimiser changes.
        weights: trained ones and frozen ones of its own, not those it shares.
    """

    role: str
    trained: int
    weights: int
    gradients: int
    optimizer: int
    averages: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def own_tensors(module: nn.Module, shared: nn.Module | None = None) -> list[Tensor]:
    """Parameters and buffers that are not another network's."""
    others = set() if shared is None else {id(tensor) for tensor in (*shared.parameters(), *shared.buffers())}
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in others]


def frozen_row(role: str, module: nn.Module) -> Row:
    """A role that is not trained."""
    return Row(role, 0, nbytes(own_tensors(module)), 0, 0, 0)


def moments(parameters: Iterable[Tensor], optimizer: str) -> int:
    """Bytes of AdamW's two moments: "adamw" has them in the precision of the weights, "adamw-8bit" in 8 bits."""
    if optimizer == "adamw-8bit":
        return sum(state_bytes(parameter) for parameter in parameters)
    return 2 * nbytes(parameters)


def trained_row(
    role: str, module: nn.Module, shared: nn.Module | None = None, averages: int = 0, optimizer: str = "adamw"
) -> Row:
    """A role that AdamW trains.

    Args:
        shared: the network whose weights it may share.
        averages: how many averages of it are kept.
        optimizer: as `moments` takes it.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return Row(
        role,
        sum(parameter.numel() for parameter in trained),
        nbytes(own_tensors(module, shared)),
        nbytes(trained),
        moments(trained, optimizer),
        averages * sum(4 * value.numel() for value in trained_state(module).values()),
    )


def rows(run: Distillation) -> list[Row]:
    """Teacher, second network of its guidance, and the trained roles of a run."""
    teacher = frozen_network(run)
    found = [frozen_row("teacher", teacher)]
    if run.guide is not None:
        found.append(frozen_row("guide", run.guide.denoiser))
    for role in ROLES:
        if role in run.optimizers:
            averages = len(run.ema.shadows) if role == "generator" else 0
            found.append(trained_row(NAMES[role], run.role(role), teacher, averages))
    return found


def frozen_network(run: Distillation) -> Denoiser:
    """The teacher without its guidance."""
    teacher = run.networks.teacher
    return teacher.denoiser if isinstance(teacher, GuidedDenoiser) else teacher

"""Memory and operations of one iteration: the updates of a run, forward and backward, on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdistill.condition import TextCondition
from fdistill.planning.fake_tensors import Live, as_on_a_gpu, fake
from fdistill.planning.held import nbytes
from fdistill.step import Pairs, Segment
from fdistill.training.distillation import Distillation
from fdistill.training.parts import Split, backward, count_of
from fdistill.training.updates import Update

CRITIC, STUDENT = "critic", "student"
#: A critic's update with the samples of the one before, see `reuse_samples`.
REUSING = "repeated critic"
#: Update -> the roles that learn from it.
LEARN = {CRITIC: ("fake score", "heads"), REUSING: ("fake score", "heads"), STUDENT: ("student",)}
#: Update -> the section of its micro_batch.
SECTIONS = {CRITIC: "fake_score", REUSING: "fake_score", STUDENT: "generator"}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Counted:
    """One update of a process, computed in parts if the config says so.

    Attributes:
        samples: of one part.
        parts: how many there are.
        front: see `Live`; of a part with the gradients of those before it.
        inputs: bytes of the samples and conditions of all parts.
        flops: of all parts.
        times: how many of these updates an iteration has.
    """

    samples: int
    parts: int
    front: Mapping[tuple[int, int], int]
    inputs: int
    flops: int
    times: int

    def peak(
        self, *, gradients: float = 1.0, casts: bool = True, scale: float = 1.0, accumulates: bool = False
    ) -> tuple[int, int]:
        """Bytes at the peak: of gradients, and of activations with what is made in between.

        Args:
            gradients: the share of gradients that a process keeps.
            casts: whether weights that are cast to another precision are copies that a process keeps.
            scale: how many times the samples that were counted a part has; activations grow with them.
            accumulates: whether all gradients are there from the beginning, of parts before.
        """
        most = max(gradient for gradient, _ in self.front)
        found = (
            (int(gradients * (most if accumulates else gradient)), int(scale * other) + (cast if casts else 0))
            for (gradient, cast), other in self.front.items()
        )
        gradient, other = max(found, key=sum)
        return gradient, other + int(scale * self.inputs)


def count_updates(run: Distillation, processes: int) -> Iterator[tuple[str, Counted]]:
    """The critic's and the student's update of the run's last stage, as one of the processes computes them, by name.

    A student of several steps takes all of them. At most two parts run; the others are like the second.

    Args:
        run: as `run_without_weights` returns it.
        processes: among which the batch is divided; must divide it.

    Raises:
        ConfigError: micro_batch does not divide a process's batch.
    """
    stage = run.stage
    updates: dict[str, tuple[Update, int]] = {}
    if stage.batches:
        updates[CRITIC] = (run.critic_update, stage.batches)
    if stage.critic_steps > stage.batches:
        updates[REUSING] = (run.critic_update, stage.critic_steps - stage.batches)
    updates[STUDENT] = (run.student_update, 1)
    for name, (update, times) in updates.items():
        parts = count_of(stage.config, SECTIONS[name], processes)
        samples = run.config.batch_size // processes // parts
        live, inputs = _counted(run, name, update, samples, min(parts, 2))
        flops = live.flops * parts // min(parts, 2)
        yield name, Counted(samples, parts, live.front, inputs * parts // min(parts, 2), flops, times)


def _counted(run: Distillation, name: str, update: Update, samples: int, parts: int) -> tuple[Live, int]:
    teacher, optimized = run.networks.teacher, run.optimizers
    modules = [teacher, *(run.role(role) for role in optimized)]
    weights = [parameter for module in modules for parameter in module.parameters()]
    known = [*weights, *(buffer for module in modules for buffer in module.buffers())]
    known += [value for shadow in run.ema.shadows.values() for value in shadow.values()]
    trained = [parameter for parameter in weights if parameter.requires_grad]
    with fake(), as_on_a_gpu():
        arguments = _arguments(run, name, samples * parts)
        inputs = list(_tensors(arguments))
        with Live([*known, *inputs], weights) as live, live.gradients_of(trained):
            backward(update, arguments, torch.Generator(), Split(parts, run.config.precision))
    for parameter in trained:
        parameter.grad = None
    return live, nbytes(inputs)


def _arguments(run: Distillation, name: str, batch: int) -> dict[str, Any]:
    """What `Batches` gives an update, without values."""
    teacher, stage = run.networks.teacher, run.stage
    samples = torch.zeros(batch, *teacher.sample_shape)
    condition = teacher.example_condition(batch, _CPU)
    if name in (CRITIC, REUSING):
        drawn = {"fake_x0": torch.zeros_like(samples)} if name == REUSING else {}
        return {"real_x0": samples, "condition": condition, **drawn}
    given: dict[str, Any] = {"condition": condition if stage.critic_steps else None, "batch_size": batch}
    if stage.config.regression.weight:
        level = run.student.levels[0] if len(run.student.levels) > 1 else None
        given["pairs"] = Pairs(torch.zeros_like(samples), samples, condition, level)
    if stage.config.segment.weight:
        begin = run.student.levels[-1]
        given["segment"] = Segment(stage.config.segment.weight, begin, begin / 2, None)
    return given


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in the arguments of an update."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, TextCondition):
        return list(value.tensors.values())
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]

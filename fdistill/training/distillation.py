"""Everything one run holds in memory: networks, optimisers, averages, and the state that checkpoints keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.resize import Resized
from fdistill.base.distributed import part, sum_over_processes
from fdistill.base.errors import CheckpointError, NonFiniteError
from fdistill.base.state_dicts import take
from fdistill.condition import TextCondition
from fdistill.config.schema import DistillConfig
from fdistill.data.embeddings import Captions
from fdistill.divergence import Divergence
from fdistill.ema import EMA, trained_state
from fdistill.generator import Student
from fdistill.ratio import DensityRatio
from fdistill.step import Networks
from fdistill.teachers.autoencoder import LatentSpace, image_shape
from fdistill.teachers.guide import Guide
from fdistill.training.checkpoint import (
    check_tensors,
    described_tensors,
    optimizer_tensors,
    prepare_optimizer,
    read_tensors,
)
from fdistill.training.stages import Stage, age_of, stage_at
from fdistill.training.updates import Update

if TYPE_CHECKING:
    from fdistill.training.clip_loss import ClipHinge
    from fdistill.training.reward import RewardLoss


@dataclass
class Distillation:
    """Everything one run holds in memory.

    Attributes:
        device: where its networks are.
        checkpoint: the teacher's checkpoint.
        origin: the checkpoint that the student's network comes from.
        resized: which weights were copied and which are new, if student.network changed the network.
        latents: the autoencoder of a latent teacher.
        guide: the second network of the teacher's guidance, if the config has one.
        latents_folder: the folder of cached latents, if the run reads one.
        text: the encoded prompts of a text-to-image teacher.
        none: the "no class" label or the null prompt; None for a teacher that has neither.
        clip: the CLIP loss on decoded samples, if the config has one.
        reward: the preference model's loss on decoded samples, if the config has one.
        sharded: whether a process holds parts of the weights only, so that every process must take part in whatever
            runs or gathers a network.
        empty_student: with several processes, the student without memory for weights, to be exported.
    """

    config: DistillConfig
    device: torch.device
    checkpoint: Checkpoint
    origin: Checkpoint
    resized: Resized | None
    latents: LatentSpace | None
    guide: Guide | None
    latents_folder: Path | None
    text: Captions | None
    none: TextCondition | int | None
    clip: ClipHinge | None
    reward: RewardLoss | None
    networks: Networks
    student: Student
    sharded: bool
    empty_student: Student | None
    optimizers: dict[str, Optimizer]
    ema: EMA
    ratio: DensityRatio
    stages: tuple[Stage, ...]
    iteration: int = 0

    @property
    def stage(self) -> Stage:
        """The stage in which the iteration lies."""
        return stage_at(self.stages, self.iteration)

    @property
    def divergence(self) -> Divergence:
        """Of the stage."""
        return self.stage.divergence

    @property
    def critic_update(self) -> Update:
        """Of the stage, whose method must have one."""
        assert self.stage.critic_update is not None
        return self.stage.critic_update

    @property
    def student_update(self) -> Update:
        """Of the stage."""
        return self.stage.student_update

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images, after decoding if samples are latents."""
        return self.image_shape[-1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, after decoding if samples are latents."""
        return image_shape(self.networks.teacher, self.latents)

    def role(self, name: str) -> nn.Module:
        """The trainable module of a role: "generator", "fake_score" or "discriminator"."""
        module: nn.Module = getattr(self.networks, name)
        return module

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs. Random draws depend on seed and iteration alone."""
        tensors = {"ratio.bins": self.ratio.bins}
        tensors.update({f"ema.{name}": value for name, value in self.ema.state_dict().items()})
        for name, optimizer in self.optimizers.items():
            tensors.update({f"{name}.{key}": value for key, value in trained_state(self.role(name)).items()})
            tensors.update({f"optimizer.{name}.{key}": value for key, value in optimizer_tensors(optimizer).items()})
        return tensors

    def check_finite(self) -> None:
        """Raises NonFiniteError if a role's weights are not finite; called before weights are saved."""
        for name in self.optimizers:
            values = [part(parameter) for parameter in self.role(name).parameters()]
            wrong = torch.stack([~torch.isfinite(value).all() for value in values]).any().float()
            if sum_over_processes(wrong.to(self.device)):
                raise NonFiniteError(f"{name}: its weights became NaN or infinite in the last update")

    def load_state(self, path: Path, iteration: int) -> None:
        """Restores what `state` returned after an iteration from an intact checkpoint; every process must call it.

        Raises:
            CheckpointError: it is of another run.
        """
        stored = described_tensors(path)
        own = {name: value for name, value in self.state().items() if not name.startswith("optimizer.")}
        trained = [role for role in self.optimizers if age_of(role, self.stages, iteration)]
        try:
            check_tensors(stored, own, self.optimizers, trained)
        except ValueError as error:
            raise CheckpointError(f"its tensors: {error}") from error
        for name, optimizer in self.optimizers.items():
            prepare_optimizer(optimizer, stored, f"optimizer.{name}")
        tensors = self.state()
        read_tensors(path, tensors)  # into the memory of weights, averages, optimisers and bins
        self.ema.load_state_dict(take(tensors, "ema"))  # for the number of its updates, which is no tensor
        self.iteration = iteration

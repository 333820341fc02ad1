"""From a config to networks, optimisers and state. Reads checkpoints and data, writes nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fdistill.adapters import family, load_teacher, resolve_checkpoint
from fdistill.checkpoint import load_exactly, load_optimizer_tensors, optimizer_tensors, take
from fdistill.config import DistillConfig, LevelsConfig, OptimizerConfig
from fdistill.data import ImageSet, load_data
from fdistill.discriminator import Discriminator
from fdistill.divergence import Divergence, get_divergence
from fdistill.ema import EMA
from fdistill.errors import ArgumentError, CheckpointError, ConfigError, NonFiniteError
from fdistill.generator import OneStepGenerator
from fdistill.noise import LEVEL_SAMPLERS, noise_to_signal_range
from fdistill.ratio import DensityRatio
from fdistill.step import LevelDraw, Networks


@dataclass
class Distillation:
    """Everything one run holds in memory."""

    teacher_folder: Path
    data: ImageSet
    divergence: Divergence
    networks: Networks
    optimizers: dict[str, torch.optim.AdamW]
    ema: EMA
    ratio: DensityRatio
    critic_levels: LevelDraw
    matching_levels: LevelDraw
    iteration: int = 0

    def role(self, name: str) -> nn.Module:
        """The trainable module of an optimiser's role."""
        module: nn.Module = getattr(self.networks, name)
        return module

    def state(self) -> dict[str, Tensor]:
        """All tensors a resumed run needs; its randomness needs none, being a function of seed and iteration."""
        tensors = {"ratio.bins": self.ratio.bins}
        tensors.update({f"ema.{name}": value for name, value in self.ema.state_dict().items()})
        for name, optimizer in self.optimizers.items():
            tensors.update({f"{name}.{key}": value for key, value in self.role(name).state_dict().items()})
            tensors.update({f"optimizer.{name}.{key}": value for key, value in optimizer_tensors(optimizer).items()})
        return tensors

    def check_finite(self) -> None:
        """Raises NonFiniteError if an update has broken a role's weights, so that they are not saved."""
        for name in self.optimizers:
            if not all(bool(torch.isfinite(parameter).all()) for parameter in self.role(name).parameters()):
                raise NonFiniteError(f"{name}: its weights became NaN or infinite in the last update")

    def load_state(self, tensors: dict[str, Tensor], what: str) -> None:
        """Restores `state`; raises CheckpointError where it does not fit these networks."""
        missing = {name for name in self.state() if not name.startswith("optimizer.")} - tensors.keys()
        if missing or not any(name.startswith("optimizer.generator.") for name in tensors):
            raise CheckpointError(
                f"{what}: incomplete, {sorted(missing)[:1] or 'the optimiser state'} is missing; "
                "delete that folder to resume from the one before it"
            )
        for name, optimizer in self.optimizers.items():
            load_exactly(self.role(name), take(tensors, name), f"{what}, {name}")
            load_optimizer_tensors(optimizer, take(tensors, f"optimizer.{name}"))
        self.ema.load_state_dict(take(tensors, "ema"))
        self.ratio.bins = tensors["ratio.bins"].to(self.ratio.bins.device)


def build(config: DistillConfig, device: torch.device) -> Distillation:
    """Networks and state at iteration 0: student and fake score are copies of the teacher.

    Raises:
        ConfigError: settings that do not fit one another or the teacher.
        CheckpointError: the teacher cannot be read, or no student of it could be exported.
    """
    try:
        divergence = get_divergence(config.divergence)
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error
    if config.discriminator.gan_weight == 0:
        if divergence.name != "reverse-kl":
            raise ConfigError(
                f"config: divergence {divergence.name!r} weights by a density ratio that only a trained discriminator "
                "knows; expected discriminator.gan_weight > 0, or divergence=reverse-kl"
            )
        if config.generator.gan_weight > 0:
            raise ConfigError(
                "config: generator.gan_weight follows a discriminator that discriminator.gan_weight=0 leaves "
                "untrained; expected generator.gan_weight=0 as well"
            )
    teacher_folder = resolve_checkpoint(config.teacher)
    teacher = load_teacher(teacher_folder, device)
    family(teacher_folder).check_exportable(teacher)
    data = load_data(config.data)
    _check_data(config, teacher.sample_shape, teacher.num_classes, data)

    torch.manual_seed(config.seed)
    try:
        level = teacher.schedule.t_max if config.student_level is None else config.student_level
        generator = OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True).train(), level)
        fake_score = copy.deepcopy(teacher).requires_grad_(True).train()
        tapped = fake_score if config.discriminator.source == "fake" else teacher
        discriminator = Discriminator(tapped, config.discriminator.features).to(device)
        low, high = (teacher.schedule.t_min, teacher.schedule.t_max)
        if config.ratio.bin_edges == "log-sigma":
            low, high = noise_to_signal_range(teacher.schedule)
        ratio = DensityRatio(**config.ratio.model_dump(exclude={"warmup"}), sigma_min=low, sigma_max=high)
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error
    networks = Networks(teacher, fake_score, generator, discriminator, tapped)
    return Distillation(
        teacher_folder=teacher_folder,
        data=data,
        divergence=divergence,
        networks=networks,
        optimizers={
            "generator": _optimizer(generator, config.generator),
            "fake_score": _optimizer(fake_score, config.fake_score),
            "discriminator": _optimizer(discriminator, config.discriminator),
        },
        ema=EMA(generator, config.ema.decays),
        ratio=ratio,
        critic_levels=level_draw(config.critic_levels),
        matching_levels=level_draw(config.matching_levels),
    )


def level_draw(config: LevelsConfig) -> LevelDraw:
    """The level sampler a config section describes."""
    used = {"karras": {"low", "high", "rho"}, "uniform": {"low", "high"}, "lognormal": {"mean", "std"}}[config.sampler]
    return partial(LEVEL_SAMPLERS[config.sampler], **config.model_dump(include=used))


def _optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _check_data(config: DistillConfig, sample_shape: tuple[int, ...], num_classes: int | None, data: ImageSet) -> None:
    if tuple(data.images.shape[1:]) != tuple(sample_shape):
        raise ConfigError(
            f"data {config.data!r} has images of shape {tuple(data.images.shape[1:])} (C, H, W), but teacher "
            f"{config.teacher!r} makes {tuple(sample_shape)}; expected data like the teacher's"
        )
    highest = int(data.labels.max())
    if num_classes is not None and highest >= num_classes:
        raise ConfigError(
            f"data {config.data!r} has class {highest}, but teacher {config.teacher!r} knows 0 to {num_classes - 1}; "
            "expected data like the teacher's"
        )

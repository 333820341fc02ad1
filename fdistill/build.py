"""From a config to networks, optimisers and state. Reads checkpoints and data, writes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdistill.adapters import Checkpoint, load_denoiser, load_teacher, resolve_checkpoint
from fdistill.adapters.resize import Resized, resized
from fdistill.checkpoint import load_exactly, load_optimizer_tensors, optimizer_tensors, take
from fdistill.config import DistillConfig, LevelsConfig, OptimizerConfig
from fdistill.denoiser import Denoiser
from fdistill.discriminator import ChannelMean, Discriminator
from fdistill.divergence import Divergence, get_divergence
from fdistill.ema import EMA
from fdistill.errors import ArgumentError, CheckpointError, ConfigError, NonFiniteError
from fdistill.generator import Generator, student_generator
from fdistill.guidance import GuidedDenoiser
from fdistill.kernels.checks import check_positive
from fdistill.latents import LatentSpace, attach_latent_space
from fdistill.lora import lora_copy
from fdistill.methods import METHODS
from fdistill.noise import LEVEL_SAMPLERS, noise_to_signal_range
from fdistill.ratio import DensityRatio
from fdistill.step import (
    LevelDraw,
    Networks,
    StepResult,
    critic_step,
    diffratio_step,
    generator_step,
    ratio_critic_step,
    sid_step,
    sim_step,
    uni_instruct_step,
)

Update = Callable[..., StepResult]


@dataclass
class Distillation:
    """Everything one run holds in memory.

    Attributes:
        checkpoint: the teacher's.
        origin: where the student's network comes from.
        resized: what became of its weights, if the network was changed.
        latents: the autoencoder of a latent teacher.
    """

    checkpoint: Checkpoint
    origin: Checkpoint
    resized: Resized | None
    latents: LatentSpace | None
    divergence: Divergence
    networks: Networks
    student: Generator
    optimizers: dict[str, torch.optim.AdamW]
    ema: EMA
    ratio: DensityRatio
    critic_update: Update
    student_update: Update
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
            tensors.update({f"{name}.{key}": value for key, value in _trained(self.role(name)).items()})
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
            untrained = self.role(name).state_dict().keys() - _trained(self.role(name)).keys()
            own = {key: value for key, value in self.role(name).state_dict().items() if key in untrained}
            load_exactly(self.role(name), {**own, **take(tensors, name)}, f"{what}, {name}")
            load_optimizer_tensors(optimizer, take(tensors, f"optimizer.{name}"))
        self.ema.load_state_dict(take(tensors, "ema"))
        self.ratio.bins = tensors["ratio.bins"].to(self.ratio.bins.device)


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen weights, which may be another network's as well."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def _freeze_beyond(denoiser: Denoiser, features: Sequence[str]) -> None:
    """Takes the gradient from the parameters that the named features do not depend on: those of the decoder."""
    device = next(denoiser.parameters()).device
    t = torch.full((1,), denoiser.schedule.t_min, device=device)
    condition = torch.zeros(1, dtype=torch.long, device=device) if denoiser.num_classes else None
    tapped = denoiser.features(torch.zeros(1, *denoiser.sample_shape, device=device), t, condition, features)
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    reached = torch.autograd.grad([value.sum() for value in tapped.values()], trainable, allow_unused=True)
    for parameter, gradient in zip(trainable, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


def build(config: DistillConfig, device: torch.device) -> Distillation:
    """Networks and state at iteration 0: the fake score is a copy of the teacher, and so is the student unless the
    config says otherwise.

    Raises:
        ConfigError: settings that do not fit one another or the teacher.
        CheckpointError: the teacher, or what the student starts from, cannot be read.
    """
    try:
        divergence = get_divergence(config.divergence or "reverse-kl")
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error
    adversarial = config.discriminator.gan_weight > 0
    if not adversarial:
        if divergence.needs_ratio:
            raise ConfigError(
                f"config: divergence {divergence.name!r} weights by a density ratio that only a trained discriminator "
                "knows; expected discriminator.gan_weight > 0, or divergence=reverse-kl"
            )
        if config.generator.gan_weight > 0:
            raise ConfigError(
                "config: generator.gan_weight follows a discriminator that discriminator.gan_weight=0 leaves "
                "untrained; expected generator.gan_weight=0 as well"
            )
        if METHODS[config.method].objective == "diffratio":
            raise ConfigError(
                "config: method=diffratio has nothing but its classifier; expected discriminator.gan_weight > 0"
            )
    elif config.data is None:
        raise ConfigError(
            f"data: got null, but method={config.method} shows real images to a discriminator; expected a data set, or "
            "teacher-samples"
        )
    checkpoint = resolve_checkpoint(config.teacher)
    unguided = load_teacher(config.teacher, device, null_class=config.null_class)
    latents = attach_latent_space(unguided, checkpoint, config.vae)

    torch.manual_seed(config.seed)
    origin, student, changed = _student_network(config, checkpoint, unguided)
    try:
        teacher = unguided if config.guidance_scale == 1 else GuidedDenoiser(unguided, config.guidance_scale)
        levels = config.student_levels or (student.schedule.t_max,)
        generator = student_generator(student.to(device).requires_grad_(True).train(), levels)
        if config.fake_score.lora_rank:
            fake_score = lora_copy(unguided, config.fake_score.lora_rank).train()
        else:
            fake_score = copy.deepcopy(unguided).requires_grad_(True).train()
        tapped = fake_score if config.discriminator.source == "fake" else teacher
        discriminator: Discriminator | ChannelMean | None = None
        if adversarial:
            head = Discriminator if config.discriminator.head == "convolutional" else ChannelMean
            discriminator = head(tapped, config.discriminator.features).to(device)
        if METHODS[config.method].objective == "diffratio":
            _freeze_beyond(fake_score, config.discriminator.features)
        low, high = (teacher.schedule.t_min, teacher.schedule.t_max)
        check_positive("sigma(t_min) of the teacher's schedule", teacher.schedule.sigma(torch.tensor(low)))
        if config.ratio.bin_edges == "log-sigma":
            low, high = noise_to_signal_range(teacher.schedule)
        ratio = DensityRatio(**config.ratio.model_dump(exclude={"warmup"}), sigma_min=low, sigma_max=high)
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error
    _check_weights(config, divergence)
    networks = Networks(teacher, fake_score, generator, discriminator, tapped if discriminator is not None else None)
    optimizers = {
        name: _optimizer(module, getattr(config, name))
        for name, module in (("generator", generator), ("fake_score", fake_score), ("discriminator", discriminator))
        if module is not None and any(parameter.requires_grad for parameter in module.parameters())
    }
    return Distillation(
        checkpoint=checkpoint,
        origin=origin,
        resized=changed,
        latents=latents,
        divergence=divergence,
        networks=networks,
        student=generator,
        optimizers=optimizers,
        ema=EMA(generator, config.ema.decays, config.ema.sigma_rel),
        ratio=ratio,
        critic_update=_critic_update(config, networks),
        student_update=_student_update(config, networks, divergence, ratio),
    )


def _student_network(
    config: DistillConfig, checkpoint: Checkpoint, teacher: Denoiser
) -> tuple[Checkpoint, Denoiser, Resized | None]:
    """Where the student's network comes from, the network, and what became of its weights if it was changed."""
    origin, start = checkpoint, teacher
    if config.student.checkpoint is not None:
        origin = resolve_checkpoint(config.student.checkpoint)
        start = load_denoiser(origin, null_class=config.null_class)
        if start.sample_shape != teacher.sample_shape or start.num_classes != teacher.num_classes:
            raise ConfigError(
                f"student.checkpoint {origin.name!r}: makes samples {start.sample_shape} of {start.num_classes} "
                f"classes, the teacher {teacher.sample_shape} of {teacher.num_classes}; expected the same of both"
            )
        start.latent_scaling = teacher.latent_scaling
    if config.student.network:
        changed = resized(start, config.student.network)
        return origin, changed.denoiser, changed
    return origin, copy.deepcopy(teacher) if start is teacher else start, None


def _check_weights(config: DistillConfig, divergence: Divergence) -> None:
    """Raises ConfigError if h overflows, or vanishes everywhere, at a ratio that the clamp lets through."""
    lower, upper = config.ratio.lower, config.ratio.upper
    r = torch.tensor([lower / upper, upper / lower], dtype=torch.float64)  # after division by the bins' means
    for at, h in zip(r.tolist(), divergence.weight(r).tolist(), strict=True):
        if not 0 <= h < 1e300:
            raise ConfigError(
                f"divergence {divergence.name!r}: h({at:g}) is {h:g}, more than a float holds; expected ratio.lower "
                "and ratio.upper closer together, or a divergence that grows less"
            )


def _critic_update(config: DistillConfig, networks: Networks) -> Update:
    levels = level_draw(config.critic_levels)
    if METHODS[config.method].objective == "diffratio":
        return partial(ratio_critic_step, networks, levels=levels, r1_weight=config.discriminator.r1_weight)
    return partial(
        critic_step,
        networks,
        levels=levels,
        weighting=config.fake_score.weighting,
        min_snr_gamma=config.fake_score.min_snr_gamma,
        gan_weight=config.discriminator.gan_weight,
        gan_weighting=config.discriminator.gan_weighting,
        r1_weight=config.discriminator.r1_weight,
    )


def _student_update(config: DistillConfig, networks: Networks, divergence: Divergence, ratio: DensityRatio) -> Update:
    objective, generator = METHODS[config.method].objective, config.generator
    common: dict[str, Any] = {"levels": level_draw(config.matching_levels)}
    if objective == "sim":
        assert config.objective.huber_c is not None
        return partial(sim_step, networks, **common, huber_c=config.objective.huber_c)
    common.update(weighting=generator.weighting)
    if objective == "diffratio":
        return partial(diffratio_step, networks, **common)
    common.update(gan_weight=generator.gan_weight)
    if objective == "sid":
        assert config.objective.alpha is not None
        return partial(sid_step, networks, **common, alpha=config.objective.alpha)
    common.update(divergence=divergence, ratio=ratio)
    if objective == "uni-instruct":
        return partial(uni_instruct_step, networks, **common, detach_weight=config.objective.detach_weight)
    return partial(generator_step, networks, **common, regression_weight=config.regression.weight)


def level_draw(config: LevelsConfig) -> LevelDraw:
    """The level sampler a config section describes."""
    used = {"karras": {"low", "high", "rho"}, "uniform": {"low", "high"}, "lognormal": {"mean", "std"}}[config.sampler]
    return partial(LEVEL_SAMPLERS[config.sampler], **config.model_dump(include=used))


def _optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )

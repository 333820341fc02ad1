"""Builds networks, optimisers and state from a config. Reads checkpoints and data, writes nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from fdistill.adapters.checkpoint import Checkpoint, resolve_checkpoint
from fdistill.adapters.parametrisation import read_scheduler_config
from fdistill.adapters.quantised_layers import place
from fdistill.adapters.resize import Resized, resized
from fdistill.adapters.step_levels import step_levels
from fdistill.base import rng
from fdistill.base.devices import autocast
from fdistill.base.distributed import first_process_of_machine_first
from fdistill.base.errors import ArgumentError, ConfigError
from fdistill.condition import TextCondition
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import LoRAConfig
from fdistill.data.embeddings import Captions
from fdistill.denoiser import Denoiser
from fdistill.discriminator import ChannelMean, Discriminator
from fdistill.divergence import Divergence
from fdistill.ema import EMA
from fdistill.generator import Student
from fdistill.guidance import GuidedDenoiser
from fdistill.methods import METHODS
from fdistill.noise import NoiseSchedule, noise_to_signal_range
from fdistill.ratio import DensityRatio
from fdistill.step import Networks
from fdistill.students.kinds import KINDS
from fdistill.students.lora import FAKE, STUDENT, lora_copy, round_adapters
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.teachers.guide import Guide, open_guide
from fdistill.teachers.teacher import Teacher, TeacherSettings, open_teacher
from fdistill.training import checks, sharding
from fdistill.training.activation_checkpointing import checkpoint_activations
from fdistill.training.alignment import check_alignment
from fdistill.training.distillation import Distillation
from fdistill.training.optimise import make_optimizers
from fdistill.training.phases import phased_student
from fdistill.training.prompts import Obtain, encode, open_inputs
from fdistill.training.speed import check_speed, quicken
from fdistill.training.stages import make_stages, trained_roles
from fdistill.training.starts import open_start, start_roles

if TYPE_CHECKING:
    from fdistill.training.clip_loss import ClipHinge
    from fdistill.training.reward import RewardLoss


@dataclass(frozen=True)
class Loaded:
    """The inputs that are read before networks are built.

    Attributes:
        guide: the second network of the teacher's guidance, if the config has one.
        latents_folder: the folder of cached latents, if the run reads one.
        text: the encoded prompts of a text-to-image teacher.
    """

    teacher: Teacher
    guide: Guide | None
    latents_folder: Path | None
    text: Captions | None

    def null(self, device: torch.device) -> TextCondition | None:
        """The negative or empty prompt that guidance uses; None for a teacher without prompts."""
        return None if self.text is None else self.text.embeddings.null.to(device)


class _Trained(NamedTuple):
    """The trained networks, and the checkpoint that the student's comes from."""

    student: Denoiser
    fake_score: Denoiser
    origin: Checkpoint
    resized: Resized | None


def build(config: DistillConfig, device: torch.device, obtain: Obtain = encode) -> Distillation:
    """Builds the networks and state at iteration 0.

    The fake score is a copy of the teacher, and so is the student unless the config says otherwise.

    Args:
        config: the run's settings.
        device: where the networks go.
        obtain: returns the folder of encoded prompts; see `open_inputs`.

    Raises:
        ConfigError: settings do not fit one another or the teacher.
        CheckpointError: the teacher, or what the student starts from, cannot be read.
    """
    divergences = [checks.read_divergence(stage) for stage in config.stage_configs()]
    check_speed(config, rng.world()[1])
    mesh = sharding.make_mesh(config.parallel, device, offload=config.offload_frozen or config.offload_optimizers)
    loaded = _load(config, device, obtain, memory_of_files=sharding.distributes_frozen(config, mesh))
    torch.manual_seed(config.seed)
    try:
        return assemble(config, device, divergences, loaded, mesh)
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error


def _load(config: DistillConfig, device: torch.device, obtain: Obtain, *, memory_of_files: bool) -> Loaded:
    settings = TeacherSettings(
        config.teacher,
        base=config.teacher_base,
        lora=config.teacher_lora,
        lora_scale=config.teacher_lora_scale,
        null_class=config.null_class,
        vae=config.vae,
        resolution=config.resolution,
        memory_of_files=memory_of_files,
    )
    name = config.guidance_teacher
    with first_process_of_machine_first():  # what has to be converted is converted once
        teacher = open_teacher(settings)
        guide = None if name is None else open_guide(name, teacher.denoiser, memory_of_files=memory_of_files)
    stored, text = open_inputs(config, teacher, device, obtain)
    return Loaded(teacher, guide, stored, text)


def assemble(
    config: DistillConfig,
    device: torch.device,
    divergences: Sequence[Divergence],
    loaded: Loaded,
    mesh: DeviceMesh | None = None,
) -> Distillation:
    """Does what `build` does after reading, with a divergence for each stage; the mesh is `sharding.make_mesh`'s."""
    denoiser, latents, text = loaded.teacher.denoiser, loaded.teacher.latents, loaded.text
    stages = config.stage_configs()
    for stage in stages:
        checks.check_teacher(stage, denoiser)
    null = loaded.null(device)
    if denoiser.embedded_guidance is not None:
        denoiser.embedded_guidance = config.guidance_scale
    # What is distributed moves to the device block by block, so that it is nowhere as a whole.
    frozen_device = torch.device("cpu") if sharding.distributes_frozen(config, mesh) else device
    precision = "fp32" if sharding.narrows_frozen(config, mesh) else config.frozen_precision
    trained = _trained_networks(config, loaded.teacher, frozen_device, mesh, precision)
    student = _student(config, loaded.teacher, trained.student, mesh)
    roles = {role for stage in stages for role in trained_roles(stage)}
    guide = _placed(loaded.guide, config, frozen_device, precision)
    has_heads = "discriminator" in roles
    networks = _networks(config, denoiser, trained.fake_score, student, null, guide, has_discriminator=has_heads)
    if not all(METHODS[stage.method].scores for stage in stages):
        with autocast(next(trained.fake_score.parameters()).device, config.precision):
            _freeze_beyond(trained.fake_score, config.discriminator.features)
    start_roles(config, networks, denoiser)
    for stage in stages:
        check_alignment(stage, networks)
    quicken(config, (denoiser, guide, trained.fake_score, *student.denoisers, networks.discriminator))
    empty_student = None if mesh is None else sharding.blank(student)
    if mesh is not None:
        sharding.distribute(config, mesh, denoiser, guide, trained.fake_score, student, networks.discriminator)
    elif networks.discriminator is not None:
        networks.discriminator.to(device)
    ratio = _density_ratio(config, denoiser.schedule)
    return Distillation(
        config=config,
        device=device,
        checkpoint=loaded.teacher.checkpoint,
        origin=trained.origin,
        resized=trained.resized,
        latents=latents,
        guide=loaded.guide,
        latents_folder=loaded.latents_folder,
        text=text,
        none=denoiser.null_class if text is None else null,
        clip=_clip_hinge(config, latents, device) if any(stage.clip_loss.used for stage in stages) else None,
        reward=_reward_loss(config, latents, device) if any(stage.reward.used for stage in stages) else None,
        networks=networks,
        student=student,
        sharded=sharding.is_sharded(mesh),
        empty_student=empty_student,
        optimizers=make_optimizers(config, networks, roles),
        ema=EMA(student, config.ema.decays, config.ema.sigma_rel),
        ratio=ratio,
        stages=make_stages(config, networks, divergences, ratio, _trajectory(config, loaded.teacher, student)),
    )


def _trained_networks(
    config: DistillConfig, teacher: Teacher, device: torch.device, mesh: DeviceMesh | None, precision: str
) -> _Trained:
    """The student's network and the fake score, on the device unless they will be distributed.

    Each is a copy of the teacher's network or adapters on it; the student's may come from another checkpoint.

    Args:
        precision: that the frozen network takes here.
    """
    frozen = teacher.denoiser
    # Copies whose weights are trained are made before the frozen ones lose precision. For sharding they need no memory
    # of their own, unless other weights will be loaded into them.
    shared = mesh is not None
    own = None if config.student.lora_rank or config.student.checkpoint else _copied(frozen, shared)
    fake = None if config.fake_score.lora_rank else _copied(frozen, shared and config.fake_score.checkpoint is None)
    origin, student, changed = _student_network(config, teacher, own, memory_of_files=shared)
    place(frozen, precision, device)
    fake_score = fake or _adapted(frozen, config.fake_score, FAKE, "fake_score")
    student = student or _adapted(frozen, config.student, STUDENT, "student")
    for trained, lora_rank in ((student, config.student.lora_rank), (fake_score, config.fake_score.lora_rank)):
        if mesh is None or lora_rank:
            trained.to(device)
        trained.train()
        if not lora_rank:
            trained.requires_grad_(True)
        elif precision != config.frozen_precision:
            round_adapters(trained)
    if sharding.distributes_frozen(config, mesh):
        student, fake_score = sharding.aliased(student), sharding.aliased(fake_score)
    if config.gradient_checkpointing:
        for denoiser in (frozen, student, fake_score):
            checkpoint_activations(denoiser)
    return _Trained(student, fake_score, origin, changed)


def _student(config: DistillConfig, teacher: Teacher, network: Denoiser, mesh: DeviceMesh | None) -> Student:
    whole = KINDS[config.student.generator].make(network, _student_levels(config, teacher), config.student.sampler)
    if config.student.phases == 1:
        return whole
    return phased_student(config.student, teacher.denoiser, whole, shared=sharding.distributes_frozen(config, mesh))


def _student_levels(config: DistillConfig, teacher: Teacher) -> tuple[float, ...] | None:
    """The levels of the student's steps; None for those of its kind."""
    levels, student = config.student_levels, config.student
    if student.steps is None:
        return levels
    start = None if levels is None else levels[0]
    return step_levels(teacher.denoiser, student.steps, scheduler=_scheduler(teacher), start=start, shift=student.shift)


def _trajectory(config: DistillConfig, teacher: Teacher, student: Student) -> tuple[float, ...]:
    """The levels that the teacher passes from the student's first, for the diversity term; () without it."""
    if not any(stage.diversity.weight for stage in config.stage_configs()):
        return ()
    count, start = config.diversity, student.levels[0]
    levels = step_levels(teacher.denoiser, count.of, scheduler=_scheduler(teacher), start=start)
    return levels[: count.steps + 1]


def _scheduler(teacher: Teacher) -> dict[str, Any] | None:
    folder = teacher.checkpoint.folder
    return None if folder is None else read_scheduler_config(folder)


def _copied(frozen: Denoiser, shared: bool) -> Denoiser:
    return sharding.aliased(frozen) if shared else copy.deepcopy(frozen)


def _student_network(
    config: DistillConfig, teacher: Teacher, own: Denoiser | None, *, memory_of_files: bool
) -> tuple[Checkpoint, Denoiser | None, Resized | None]:
    """The checkpoint that the student's network comes from, the network, and the record of a changed network's weights.

    The network is None if the student will be adapters on the teacher's network; the record is None if the network's
    config was not changed.
    """
    origin, start = teacher.checkpoint, own
    if config.student.checkpoint is not None:
        origin = resolve_checkpoint(config.student.checkpoint)
        start = open_start(config, origin, teacher.denoiser, "student.checkpoint", memory_of_files=memory_of_files)
        start.latent_scaling = teacher.denoiser.latent_scaling
    if config.student.network:
        changed = resized(start or teacher.denoiser, config.student.network)
        return origin, changed.denoiser, changed
    return origin, start, None


def _adapted(frozen: Denoiser, section: LoRAConfig, adapter: str, setting: str) -> Denoiser:
    return lora_copy(
        frozen,
        section.lora_rank,
        adapter=adapter,
        setting=setting,
        alpha=section.lora_alpha,
        targets=section.lora_targets,
    )


def _placed(guide: Guide | None, config: DistillConfig, device: torch.device, precision: str) -> Denoiser | None:
    """The second network of the teacher's guidance, as the teacher itself: on the device, in the same precision."""
    if guide is None:
        return None
    place(guide.denoiser, precision, device)
    if config.gradient_checkpointing:
        checkpoint_activations(guide.denoiser)
    return guide.denoiser


def _networks(
    config: DistillConfig,
    frozen: Denoiser,
    fake_score: Denoiser,
    student: Student,
    null: TextCondition | None,
    guide: Denoiser | None,
    *,
    has_discriminator: bool,
) -> Networks:
    """The roles: guided if the config has a guidance scale."""

    def guided(denoiser: Denoiser, scale: float, guide: Denoiser | None = None) -> Denoiser:
        if scale == 1:
            return denoiser
        return GuidedDenoiser(denoiser, scale, null=null, rescale=config.guidance_rescale, guide=guide)

    teacher = guided(frozen, 1.0 if frozen.embedded_guidance is not None else config.guidance_scale, guide)
    compared = guided(fake_score, config.fake_score.guidance_scale)
    learning = guided(fake_score, config.fake_score.training_guidance_scale)
    discriminator: Discriminator | ChannelMean | None = None
    tapped = fake_score if config.discriminator.source == "fake" else teacher
    if has_discriminator:
        features, head = config.discriminator.features, config.discriminator.head
        discriminator = (
            ChannelMean(tapped, features) if head == "channel-mean" else Discriminator(tapped, features, head)
        )
    return Networks(
        teacher,
        fake_score,
        student,
        discriminator,
        tapped=tapped if discriminator is not None else None,
        compared=compared if compared is not fake_score else None,
        learning=learning if learning is not fake_score else None,
    )


def _freeze_beyond(denoiser: Denoiser, features: Sequence[str]) -> None:
    """Freezes the parameters that the named features do not depend on: those of the decoder."""
    device = next(denoiser.parameters()).device
    t = torch.full((1,), denoiser.schedule.t_min, device=device)
    condition = denoiser.example_condition(1, device)
    tapped = denoiser.features(torch.zeros(1, *denoiser.sample_shape, device=device), t, condition, features)
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    reached = torch.autograd.grad([value.sum() for value in tapped.values()], trainable, allow_unused=True)
    for parameter, gradient in zip(trainable, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


def _density_ratio(config: DistillConfig, schedule: NoiseSchedule) -> DensityRatio:
    """The density ratio, with bins over the levels t of the schedule or over its noise-to-signal ratios."""
    low, high = schedule.t_min, schedule.t_max
    if config.ratio.bin_edges == "log-sigma":
        low, high = noise_to_signal_range(schedule)
    return DensityRatio(**config.ratio.model_dump(exclude={"warmup"}), sigma_min=low, sigma_max=high)


def _clip_hinge(config: DistillConfig, latents: LatentSpace | None, device: torch.device) -> ClipHinge:
    loss = config.clip_loss
    assert loss.weights is not None
    from fdistill.training.clip_loss import ClipHinge, load_clip

    return ClipHinge(*load_clip(loss.model, loss.weights), latents, margin=loss.margin).to(device)


def _reward_loss(config: DistillConfig, latents: LatentSpace | None, device: torch.device) -> RewardLoss:
    from fdistill.training.reward import RewardLoss, load_preference_model

    return RewardLoss(load_preference_model(config.reward), latents).to(device)

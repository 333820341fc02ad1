"""From a config to networks, optimisers and state. Reads checkpoints and data, writes nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fdistill.adapters.checkpoint import Checkpoint, load_denoiser, resolve_checkpoint
from fdistill.adapters.resize import Resized, resized
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.devices import autocast
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError, NonFiniteError
from fdistill.base.state_dicts import load_exactly, take
from fdistill.condition import TextCondition
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import LoRAConfig, OptimizerConfig
from fdistill.data.embeddings import Captions
from fdistill.denoiser import Denoiser
from fdistill.discriminator import ChannelMean, Discriminator
from fdistill.divergence import Divergence, get_divergence
from fdistill.ema import EMA, trained_state
from fdistill.generator import student_generator
from fdistill.guidance import GuidedDenoiser
from fdistill.kernels.checks import check_positive
from fdistill.methods import METHODS
from fdistill.noise import noise_to_signal_range
from fdistill.ratio import DensityRatio
from fdistill.step import (
    Networks,
)
from fdistill.students.lora import FAKE, STUDENT, lora_copy
from fdistill.students.text_to_image import check_exportable
from fdistill.students.tiue import Student, TiUEGenerator, leading_levels
from fdistill.teachers.autoencoder import LatentSpace, image_size
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.training.activation_checkpointing import checkpoint_activations
from fdistill.training.checkpoint import load_optimizer_tensors, optimizer_tensors
from fdistill.training.prompts import Obtain, encode, open_inputs
from fdistill.training.updates import Update, critic_update, student_update

if TYPE_CHECKING:
    from fdistill.training.clip_loss import ClipHinge


@dataclass
class Distillation:
    """Everything one run holds in memory.

    Attributes:
        checkpoint: the teacher's.
        origin: where the student's network comes from.
        resized: what became of its weights, if the network was changed.
        latents: the autoencoder of a latent teacher.
        latents_folder: cached latents that the run reads, if it does.
        text: the prompts of a teacher that is told some, encoded.
        none: the label, or the prompt (on the device), that stands for none; None where the teacher knows neither.
        clip: the loss on images of prompts, where there is one.
    """

    checkpoint: Checkpoint
    origin: Checkpoint
    resized: Resized | None
    latents: LatentSpace | None
    latents_folder: Path | None
    text: Captions | None
    none: TextCondition | int | None
    clip: ClipHinge | None
    divergence: Divergence
    networks: Networks
    student: Student
    optimizers: dict[str, torch.optim.AdamW]
    ema: EMA
    ratio: DensityRatio
    critic_update: Update
    student_update: Update
    iteration: int = 0

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that samples are, or are decoded to."""
        return image_size(self.networks.teacher, self.latents)

    def role(self, name: str) -> nn.Module:
        """The trainable module of an optimiser's role."""
        module: nn.Module = getattr(self.networks, name)
        return module

    def state(self) -> dict[str, Tensor]:
        """All tensors a resumed run needs; its randomness needs none, being a function of seed and iteration."""
        tensors = {"ratio.bins": self.ratio.bins}
        tensors.update({f"ema.{name}": value for name, value in self.ema.state_dict().items()})
        for name, optimizer in self.optimizers.items():
            tensors.update({f"{name}.{key}": value for key, value in trained_state(self.role(name)).items()})
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
            untrained = self.role(name).state_dict().keys() - trained_state(self.role(name)).keys()
            own = {key: value for key, value in self.role(name).state_dict().items() if key in untrained}
            load_exactly(self.role(name), {**own, **take(tensors, name)}, f"{what}, {name}")
            load_optimizer_tensors(optimizer, take(tensors, f"optimizer.{name}"))
        self.ema.load_state_dict(take(tensors, "ema"))
        self.ratio.bins = tensors["ratio.bins"].to(self.ratio.bins.device)


def _freeze_beyond(denoiser: Denoiser, features: Sequence[str]) -> None:
    """Takes the gradient from the parameters that the named features do not depend on: those of the decoder."""
    device = next(denoiser.parameters()).device
    t = torch.full((1,), denoiser.schedule.t_min, device=device)
    condition = denoiser.example_condition(1, device)
    tapped = denoiser.features(torch.zeros(1, *denoiser.sample_shape, device=device), t, condition, features)
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    reached = torch.autograd.grad([value.sum() for value in tapped.values()], trainable, allow_unused=True)
    for parameter, gradient in zip(trainable, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


def build(config: DistillConfig, device: torch.device, obtain: Obtain = encode) -> Distillation:
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
    settings = TeacherSettings(
        config.teacher,
        base=config.teacher_base,
        lora=config.teacher_lora,
        lora_scale=config.teacher_lora_scale,
        null_class=config.null_class,
        vae=config.vae,
        resolution=config.resolution,
    )
    opened = open_teacher(settings)
    checkpoint, unguided, latents = opened.checkpoint, opened.denoiser, opened.latents
    stored, text = open_inputs(config, opened, device, obtain)
    null = None if text is None else text.embeddings.null.to(device)

    torch.manual_seed(config.seed)
    try:
        told = unguided.embedded_guidance is not None
        _check_guidance(config, told)
        if told:
            unguided.embedded_guidance = config.guidance_scale
        # Copies whose weights are trained are made before the frozen ones lose precision.
        copies = {
            role: None if section.lora_rank else copy.deepcopy(unguided)
            for role, section in ((STUDENT, config.student), (FAKE, config.fake_score))
        }
        origin, student, changed = _student_network(config, checkpoint, unguided, copies[STUDENT])
        if config.frozen_precision == "bf16":
            unguided.to(torch.bfloat16)
        unguided.to(device)
        fake_score = copies[FAKE] or _adapted(unguided, config.fake_score, FAKE, "fake_score")
        student = student or _adapted(unguided, config.student, STUDENT, "student")
        for trained, lora_rank in ((student, config.student.lora_rank), (fake_score, config.fake_score.lora_rank)):
            trained.to(device).train()
            if not lora_rank:
                trained.requires_grad_(True)
        if config.gradient_checkpointing:
            for denoiser in (unguided, student, fake_score):
                checkpoint_activations(denoiser)
        teacher = _guided(unguided, 1.0 if told else config.guidance_scale, null, config.guidance_rescale)
        compared = _guided(fake_score, config.fake_score.guidance_scale, null, config.guidance_rescale)
        learning = _guided(fake_score, config.fake_score.training_guidance_scale, null, config.guidance_rescale)
        generator = _generator(config, student)
        tapped = fake_score if config.discriminator.source == "fake" else teacher
        discriminator: Discriminator | ChannelMean | None = None
        if adversarial:
            head = Discriminator if config.discriminator.head == "convolutional" else ChannelMean
            discriminator = head(tapped, config.discriminator.features).to(device)
        if METHODS[config.method].objective == "diffratio":
            with autocast(device, config.precision):
                _freeze_beyond(fake_score, config.discriminator.features)
        low, high = (teacher.schedule.t_min, teacher.schedule.t_max)
        check_positive("sigma(t_min) of the teacher's schedule", teacher.schedule.sigma(torch.tensor(low)))
        if config.ratio.bin_edges == "log-sigma":
            low, high = noise_to_signal_range(teacher.schedule)
        ratio = DensityRatio(**config.ratio.model_dump(exclude={"warmup"}), sigma_min=low, sigma_max=high)
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error
    if config.condition_dropout and text is None and unguided.null_class is None:
        raise ConfigError(
            f"condition_dropout: got {config.condition_dropout}, but the teacher knows nothing that stands for no "
            "condition; expected 0, or null_class set to the teacher's label for it"
        )
    _check_weights(config, divergence)
    networks = Networks(
        teacher,
        fake_score,
        generator,
        discriminator,
        tapped=tapped if discriminator is not None else None,
        compared=compared if compared is not fake_score else None,
        learning=learning if learning is not fake_score else None,
    )
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
        latents_folder=stored,
        text=text,
        none=unguided.null_class if text is None else null,
        clip=_clip_hinge(config, latents, text, device),
        divergence=divergence,
        networks=networks,
        student=generator,
        optimizers=optimizers,
        ema=EMA(generator, config.ema.decays, config.ema.sigma_rel),
        ratio=ratio,
        critic_update=critic_update(config, networks),
        student_update=student_update(config, networks, divergence, ratio),
    )


def _adapted(frozen: Denoiser, section: LoRAConfig, adapter: str, setting: str) -> Denoiser:
    return lora_copy(
        frozen,
        section.lora_rank,
        adapter=adapter,
        setting=setting,
        alpha=section.lora_alpha,
        targets=section.lora_targets,
    )


def _guided(denoiser: Denoiser, scale: float, null: TextCondition | None, rescale: float) -> Denoiser:
    return denoiser if scale == 1 else GuidedDenoiser(denoiser, scale, null=null, rescale=rescale)


def _check_guidance(config: DistillConfig, told: bool) -> None:
    """Raises ConfigError where a setting of guidance is one that nothing reads.

    Args:
        told: whether the network is told the scale, and its copies with it.
    """
    fake = config.fake_score
    of_fake = {"guidance_scale": fake.guidance_scale, "training_guidance_scale": fake.training_guidance_scale}
    if told:
        for name, scale in of_fake.items():
            if scale != 1:
                raise ConfigError(
                    f"fake_score.{name}: got {scale:g}, but this network is told guidance_scale, as the teacher is; "
                    "expected 1"
                )
    if METHODS[config.method].objective == "diffratio" and set(of_fake.values()) != {1.0}:
        raise ConfigError(f"fake_score.guidance_scale: method={config.method} evaluates no fake score; expected 1")
    if (told or config.guidance_scale == 1) and set(of_fake.values()) == {1.0}:
        unread = {"guidance_rescale": config.guidance_rescale, "negative_prompt": config.negative_prompt}
        for name, value in unread.items():
            if value:
                raise ConfigError(f"{name}: got {value!r}, but nothing is guided; expected guidance_scale above 1")


def _clip_hinge(
    config: DistillConfig, latents: LatentSpace | None, text: Captions | None, device: torch.device
) -> ClipHinge | None:
    loss = config.clip_loss
    if not loss.weight:
        return None
    if text is None or loss.weights is None:
        lacks = "the teacher is told no prompts" if text is None else "clip_loss.weights is null"
        raise ConfigError(
            f"clip_loss.weight: got {loss.weight}, but {lacks}; expected 0, or a text-to-image teacher and a "
            "safetensors file of the model's weights"
        )
    from fdistill.training.clip_loss import ClipHinge, load_clip

    return ClipHinge(*load_clip(loss.model, loss.weights), latents, margin=loss.margin).to(device)


def _generator(config: DistillConfig, student: Denoiser) -> Student:
    if config.student.generator == "tiue":
        return TiUEGenerator(student, config.student_levels or leading_levels(student.schedule))
    levels = config.student_levels or (student.schedule.t_max,)
    if isinstance(student, TextDenoiser):
        check_exportable(student, levels)
    return student_generator(student, levels)


def _student_network(
    config: DistillConfig, checkpoint: Checkpoint, teacher: Denoiser, own: Denoiser | None
) -> tuple[Checkpoint, Denoiser | None, Resized | None]:
    """Where the student's network comes from, the network (None where it is adapters on the teacher's), and what became
    of its weights if it was changed.
    """
    origin, start = checkpoint, own
    if config.student.checkpoint is not None:
        origin = resolve_checkpoint(config.student.checkpoint)
        start = load_denoiser(origin, null_class=config.null_class)
        if isinstance(start, TextDenoiser):
            start.resize(teacher.sample_shape[-1])
        if start.embedded_guidance is not None:
            start.embedded_guidance = config.guidance_scale
        alike = (start.sample_shape, start.num_classes, (start.text_shapes or {}).keys())
        if alike != (teacher.sample_shape, teacher.num_classes, (teacher.text_shapes or {}).keys()):
            raise ConfigError(
                f"student.checkpoint {origin.name!r}: makes samples {start.sample_shape} of {start.num_classes} "
                f"classes, the teacher {teacher.sample_shape} of {teacher.num_classes}; expected the same of both, and "
                "prompts for both or none"
            )
        start.latent_scaling = teacher.latent_scaling
    if config.student.network:
        changed = resized(start or teacher, config.student.network)
        return origin, changed.denoiser, changed
    return origin, start, None


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


def _optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )

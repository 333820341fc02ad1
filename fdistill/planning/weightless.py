"""The run that a config describes, on tensors without values: only configs of the teacher are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import ModelMixin

from fdistill.adapters.checkpoint import Checkpoint, load_denoiser, resolve_configs
from fdistill.adapters.pretrained import LOADING_ERRORS, quiet_diffusers
from fdistill.adapters.unet2d_condition import TOKENS, UNet2DConditionDenoiser
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.base.files import read_json_object
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.noise import noise_to_signal_range
from fdistill.planning.fake_tensors import fake
from fdistill.teachers.autoencoder import AUTOENCODERS, pixels_per_latent
from fdistill.teachers.guide import Guide, as_guide
from fdistill.teachers.teacher import Teacher
from fdistill.training.build import Loaded, assemble
from fdistill.training.checks import read_divergence
from fdistill.training.distillation import Distillation

CPU = torch.device("cpu")

_CLIP_LOSS = "the CLIP loss, its network and the decoding before it are not counted"
_REWARD = "the preference model and the decoding before it are not counted"
#: What is not read, as (setting, what is assumed in its place).
_UNREAD = {
    "student.checkpoint": "the student has the teacher's size",
    "student.previous_phase": "the plan is the first phase's; each earlier phase adds the size of its adapters",
    "fake_score.checkpoint": "the fake score has the teacher's size",
    "clip_loss.weight": _CLIP_LOSS,
    "clip_loss.gradient_ratio": _CLIP_LOSS,
    "reward.weight": _REWARD,
    "reward.gradient_ratio": _REWARD,
}


def open_without_weights(config: DistillConfig) -> Teacher:
    """The config's teacher on tensors without values, frozen, float32, in the config's resolution; no autoencoder.

    Raises:
        CheckpointError: there is no folder or hub id of that name, or its configs cannot be used.
        ConfigError: the teacher is a function or a single file without a base.
    """
    checkpoint = _configs(config)
    denoiser = load_denoiser(checkpoint, null_class=config.null_class, load=_untrained).requires_grad_(False)
    _shorten_prompts(denoiser, checkpoint)
    if config.resolution is not None:
        factor = latent_factor(config, checkpoint)
        if denoiser.text_shapes is None or factor is None or config.resolution % factor:
            raise ConfigError(
                f"resolution: got {config.resolution}; expected null, or for a text-to-image teacher a multiple of "
                f"its autoencoder's factor, {factor or 'which it has not'}"
            )
        denoiser.resize(config.resolution // factor, config.resolution // factor)
    return Teacher(checkpoint, denoiser, None)


def run_without_weights(config: DistillConfig, teacher: Teacher) -> Distillation:
    """The run on tensors without values, at the first iteration of its last stage.

    Args:
        teacher: as `open_without_weights` returns it; a run changes its precision, so each needs one of its own.

    Raises:
        ConfigError, CheckpointError: as `build` does.
    """
    denoiser = teacher.denoiser
    noise_to_signal_range(denoiser.schedule)  # this and the divergence are computed once, from values
    divergences = [read_divergence(stage) for stage in config.stage_configs()]
    null: Any = None
    if denoiser.text_shapes is not None:
        null = SimpleNamespace(embeddings=SimpleNamespace(null=denoiser.example_condition(1, CPU)))
    guide = None if config.guidance_teacher is None else _guide(config.guidance_teacher, denoiser)
    # The check of the student's export computes with values, of which there are none.
    with fake(), mock.patch("fdistill.students.kinds.check_exportable"):
        run = assemble(_readable(config), CPU, divergences, Loaded(teacher, guide, None, null))
    run.iteration = run.stages[-1].first
    return run


def unread(config: DistillConfig) -> list[str]:
    """A sentence for each setting that a run would read more for than configs."""
    found = []
    for setting, instead in _UNREAD.items():
        section, _, name = setting.partition(".")
        value = getattr(getattr(config, section), name)
        if value:
            found.append(f"{setting}={value} is not read: {instead}")
    return found


def _readable(config: DistillConfig) -> DistillConfig:
    """The config without what is read from weights, and without moments in 8 bits, processes and offloading, which
    tensors without values cannot have. `placement` counts these by arithmetic instead.
    """
    changes: dict[str, Any] = {
        "parallel": "ddp",
        "offload_frozen": False,
        "offload_optimizers": False,
        "student": config.student.model_copy(update={"checkpoint": None, "previous_phase": None}),
        "generator": config.generator.model_copy(update={"optimizer": "adamw"}),
        "fake_score": config.fake_score.model_copy(update={"checkpoint": None, "optimizer": "adamw"}),
        "discriminator": config.discriminator.model_copy(update={"checkpoint": None, "optimizer": "adamw"}),
        "clip_loss": config.clip_loss.model_copy(update={"weight": 0.0, "gradient_ratio": 0.0}),
        "reward": config.reward.model_copy(update={"weight": 0.0, "gradient_ratio": 0.0}),
    }
    return config.model_copy(update=changes)


def _configs(config: DistillConfig) -> Checkpoint:
    name = config.teacher
    if Path(name).is_file():
        if config.teacher_base is None:
            raise ConfigError(
                f"teacher: {name!r} is a file, and a plan reads configs; expected teacher_base, the pipeline that it "
                "was made from, or a folder"
            )
        name = config.teacher_base
    checkpoint = resolve_configs(name)
    if checkpoint.folder is None:
        raise ConfigError(
            f"teacher: {name!r} is a function, and a plan reads configs; expected a folder with config.json, a hub id "
            "or an embedded teacher"
        )
    return checkpoint


def _guide(name: str, teacher: Denoiser) -> Guide:
    checkpoint = resolve_configs(name)
    denoiser = load_denoiser(checkpoint, load=_untrained)
    return as_guide(checkpoint, denoiser, teacher)


def _untrained(cls: type[ModelMixin], folder: Path) -> ModelMixin:
    """The network that a folder's config.json describes, on tensors without values."""
    try:
        with fake(), quiet_diffusers("configuration_utils"):
            network: ModelMixin = cls.from_config(read_json_object(folder / "config.json"))
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: no network can be built from it ({' '.join(str(error).split())[:300]})"
        ) from error
    return network


def _shorten_prompts(denoiser: Denoiser, checkpoint: Checkpoint) -> None:
    """Gives the prompts of a UNet the length to which the checkpoint's own tokenizer cuts and fills them."""
    if not isinstance(denoiser, UNet2DConditionDenoiser):
        return
    try:
        settings = read_json_object((checkpoint.folder or Path()) / "tokenizer" / "tokenizer_config.json")
    except (OSError, ValueError):
        return
    limit = settings.get("model_max_length")
    if isinstance(limit, int) and 0 < limit < TOKENS:
        denoiser.text_shapes = {
            name: (limit, *shape[1:]) if shape[0] == TOKENS else shape for name, shape in denoiser.text_shapes.items()
        }


def latent_factor(config: DistillConfig, checkpoint: Checkpoint) -> int | None:
    """How many times longer the side of an image is than that of its latents; None without an autoencoder."""
    import diffusers

    folder = (checkpoint.folder or Path()) / "vae"
    if config.vae is not None:
        given = resolve_configs(config.vae).folder or Path()
        folder = given / "vae" if (given / "vae").is_dir() else given
    try:
        settings = read_json_object(folder / "config.json")
    except (OSError, ValueError):
        return None
    name = settings.get("_class_name")
    if name not in AUTOENCODERS:
        return None
    with torch.device("meta"):
        return pixels_per_latent(getattr(diffusers, str(name)).from_config(settings))

"""A teacher: its denoiser, and the autoencoder if it works on latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fdistill.adapters.checkpoint import Checkpoint, load_denoiser, resolve_checkpoint
from fdistill.base.errors import ConfigError
from fdistill.base.files import atomic_folder
from fdistill.denoiser import Denoiser
from fdistill.formats.merged_lora import merged_folder
from fdistill.formats.pipeline_folder import share_files
from fdistill.formats.single_file import single_file_to_folder
from fdistill.teachers.autoencoder import LatentSpace, attach_latent_space, image_size


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser in eval mode, float32, on the CPU.

    Attributes:
        checkpoint: the source of the denoiser. It is a folder in $FDISTILL_CACHE if the teacher was given as a single
            file, or has a LoRA merged in.
        latents: None for a teacher of pixels.
    """

    checkpoint: Checkpoint
    denoiser: Denoiser
    latents: LatentSpace | None

    @property
    def image_size(self) -> int:
        """Side in pixels of the images, after decoding if samples are latents."""
        return image_size(self.denoiser, self.latents)


@dataclass(frozen=True)
class TeacherSettings:
    """What a teacher is made of.

    Attributes:
        name: the checkpoint; anything that `resolve_checkpoint` takes, or a single file.
        base: the published pipeline that a single-file checkpoint was trained from.
        lora: a LoRA file that is merged into the checkpoint.
        lora_scale: the factor on the LoRA's update.
        null_class: the label that stands for no class, where the checkpoint does not say it.
        vae: autoencoder of a latent teacher whose folder has none.
        resolution: side in pixels of a text-to-image teacher's images; None is the teacher's own.
        memory_of_files: as for `load_denoiser`.
    """

    name: str
    base: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    null_class: int | None = None
    vae: str | None = None
    resolution: int | None = None
    memory_of_files: bool = False


def open_teacher(settings: TeacherSettings) -> Teacher:
    """Loads a teacher.

    Raises:
        CheckpointError: files cannot be read, or are of an unknown kind.
        ConfigError: a base, a LoRA or a resolution is given for a teacher that has no use for it.
    """
    checkpoint = _resolve(settings.name, settings.base)
    if settings.lora is not None:
        if checkpoint.folder is None:
            raise ConfigError(f"teacher_lora: teacher {settings.name!r} is a function; expected a pipeline folder")
        merged = merged_folder(checkpoint.folder, Path(settings.lora), settings.lora_scale)
        checkpoint = Checkpoint(checkpoint.name, merged)
    denoiser = load_denoiser(
        checkpoint, null_class=settings.null_class, memory_of_files=settings.memory_of_files
    ).requires_grad_(False)
    latents = attach_latent_space(denoiser, checkpoint, settings.vae)
    if settings.resolution is not None:
        _resize(denoiser, latents, settings.resolution)
    return Teacher(checkpoint, denoiser, latents)


def _resize(denoiser: Denoiser, latents: LatentSpace | None, resolution: int) -> None:
    if denoiser.text_shapes is None or latents is None:
        raise ConfigError(
            f"resolution: got {resolution}, but only text-to-image teachers make images of other sizes than their own; "
            "expected null"
        )
    size, rest = divmod(resolution, latents.factor)
    if rest or size < 1:
        raise ConfigError(
            f"resolution: got {resolution}; expected a multiple of {latents.factor}, the autoencoder's factor"
        )
    denoiser.resize(size, size)


def _resolve(name: str, base: str | None) -> Checkpoint:
    path = Path(name)
    if path.is_file() and (path.suffix in (".safetensors", ".ckpt") or base is not None):
        found = None if base is None else resolve_checkpoint(base).folder
        return Checkpoint(name, single_file_to_folder(path, found))
    if base is not None:
        raise ConfigError(f"teacher_base: got {base!r}, but teacher {name!r} is not a single file; expected null")
    return resolve_checkpoint(name)


def copy_single_file(path: Path, base: str, output: Path) -> Path:
    """A single-file checkpoint as a pipeline folder of the user's own.

    Args:
        base: folder or hub id of the published pipeline that it was made from.
        output: a claimed folder.

    Raises:
        CheckpointError: the file or the base cannot be read.
        OutputError: the folder cannot be written.
    """
    made = single_file_to_folder(path, resolve_checkpoint(base).folder)
    with atomic_folder(output) as temporary:
        share_files(made, temporary)
    return output

"""The second network of a teacher's guidance: one without classes, as EDM2's presets have it, or a weaker one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.adapters import set_null_class
from fdistill.adapters.checkpoint import Checkpoint, load_denoiser, resolve_checkpoint
from fdistill.base.errors import CheckpointError
from fdistill.denoiser import Denoiser

_LEVELS = 9


@dataclass(frozen=True)
class Guide:
    """A frozen denoiser in eval mode, float32, on the CPU, and its checkpoint."""

    checkpoint: Checkpoint
    denoiser: Denoiser

    def joined(self, sha256: str) -> str:
        """A hash of the guide and of what else `sha256` is the hash of."""
        return hashlib.sha256(f"{sha256} {self.checkpoint.fingerprint(self.denoiser)}".encode()).hexdigest()


def open_guide(name: str, teacher: Denoiser, *, memory_of_files: bool = False) -> Guide:
    """Loads the network that guidance of a teacher leads away from.

    Args:
        name: anything that `resolve_checkpoint` takes.
        teacher: opened, with the size of its samples set.
        memory_of_files: as for `load_denoiser`.

    Raises:
        CheckpointError: it cannot be read; its samples, levels or outputs do not mean what the teacher's do; or it
            takes another kind of condition.
    """
    checkpoint = resolve_checkpoint(name)
    return as_guide(checkpoint, load_denoiser(checkpoint, memory_of_files=memory_of_files), teacher)


def as_guide(checkpoint: Checkpoint, denoiser: Denoiser, teacher: Denoiser) -> Guide:
    """A denoiser as the guide of an opened teacher, frozen; raises CheckpointError as `open_guide` does."""
    denoiser.requires_grad_(False)
    if denoiser.text_shapes is not None and teacher.text_shapes is not None:
        denoiser.resize(*teacher.sample_shape[1:])
    if denoiser.num_classes is not None and teacher.null_class == denoiser.num_classes - 1:
        set_null_class(denoiser, teacher.null_class)
    _check(f"guidance_teacher {checkpoint.name!r}", denoiser, teacher)
    return Guide(checkpoint, denoiser)


def _check(what: str, guide: Denoiser, teacher: Denoiser) -> None:
    if guide.sample_shape != teacher.sample_shape:
        raise CheckpointError(
            f"{what}: makes samples {guide.sample_shape}, the teacher {teacher.sample_shape}; expected the same of both"
        )
    if guide.latent_scaling and teacher.latent_scaling and guide.latent_scaling != teacher.latent_scaling:
        raise CheckpointError(f"{what}: its latents are scaled otherwise than the teacher's; expected the same of both")
    first, second = _schedule(guide), _schedule(teacher)
    if first.shape != second.shape or not torch.allclose(first, second, rtol=1e-5):
        raise CheckpointError(
            f"{what}: has another noise schedule than the teacher; expected the same levels, alpha and sigma"
        )
    first, second = _form(guide, teacher), _form(teacher, teacher)
    if not torch.allclose(first, second, rtol=1e-5):
        raise CheckpointError(
            f"{what}: predicts something else than the teacher, or with another sigma_data; expected the same of both"
        )
    if guide.text_shapes is not None and guide.text_shapes != teacher.text_shapes:
        raise CheckpointError(
            f"{what}: takes prompts as {guide.text_shapes}, the teacher as {teacher.text_shapes}; expected the "
            "same, or a network without prompts"
        )
    if guide.num_classes is not None and guide.num_classes != teacher.num_classes:
        raise CheckpointError(
            f"{what}: has {guide.num_classes} classes, the teacher {teacher.num_classes or 'none'}; expected the same, "
            "or a network without classes"
        )
    if guide.embedded_guidance is not None:
        raise CheckpointError(f"{what}: takes a guidance scale as an input; expected a network that takes none")


def _levels(of: Denoiser) -> Tensor:
    low, high = of.schedule.t_min, of.schedule.t_max
    return torch.linspace(low, high, _LEVELS, dtype=torch.float64)


def _schedule(denoiser: Denoiser) -> Tensor:
    t = _levels(denoiser)
    return torch.stack([t, denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)])


def _form(denoiser: Denoiser, teacher: Denoiser) -> Tensor:
    """Input scale, skip and out at the teacher's levels."""
    t = _levels(teacher)
    scale, skip, out = denoiser.preconditioning(t)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    return torch.stack([one if scale is None else scale, zero if skip is None else skip, one if out is None else out])

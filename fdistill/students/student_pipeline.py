"""What the pipeline classes of fdistill share; diffusers loads their folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fdistill.base.errors import ArgumentError
from fdistill.denoiser import Denoiser, LatentScaling
from fdistill.generator import Student
from fdistill.teachers.autoencoder import decode_samples


class StudentPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that runs a student by fdistill's own code.

    Attributes:
        vae: the autoencoder of a latent student, or None.
    """

    @property
    def takes_prompts(self) -> bool:
        """Whether the pipeline is called with prompts."""
        return False

    def make_student(self) -> Student:
        """Builds the student from the pipeline's network and settings."""
        raise NotImplementedError

    @staticmethod
    def _labels(
        student: Student, class_labels: Sequence[int] | torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """Labels [B] on the device, or None for a student without classes; ArgumentError if they do not fit it."""
        if student.num_classes is None:
            if class_labels is not None:
                raise ArgumentError("class_labels: this student takes no class labels; expected None")
            return None
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=device).reshape(-1)
        if labels is None or not bool(((labels >= 0) & (labels < student.num_classes)).all()):
            got = None if labels is None else labels.tolist()
            raise ArgumentError(f"class_labels: expected labels in [0, {student.num_classes}), got {got}")
        return labels

    def _images(
        self, samples: torch.Tensor, scaling: LatentScaling | None, output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple[Any]:
        """What the call returns for a student's samples [B, C, H, W].

        Args:
            scaling: of the latents of the pipeline's autoencoder; None for samples of pixels.
        """
        if scaling is not None:
            samples = decode_samples(self.vae, scaling, samples)
        images: Any = (samples / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def pipeline_settings(denoiser: Denoiser, **own: Any) -> dict[str, Any]:
    """The mapping `student` in a pipeline's config: the settings of its class alone, and those that all classes have.

    "null_class" is the label for "no class"; "latent_scale", "latent_bias" and "pixel_range" are those of the
    `LatentScaling`, and absent for a student of pixels.
    """
    scaling = {} if denoiser.latent_scaling is None else denoiser.latent_scaling.settings()
    return {**own, "null_class": denoiser.null_class, **scaling}

"""`OneStepPipeline` runs the students that no pipeline class of diffusers can run; diffusers loads its folders."""

# No `from __future__ import annotations`: diffusers compares a pipeline's components with the classes in its
# constructor's annotations, and older versions understand only plain classes there.

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from fdistill.adapters import set_null_class, wrap
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.base.errors import ArgumentError
from fdistill.denoiser import LatentScaling
from fdistill.generator import Student, student_generator
from fdistill.teachers.autoencoder import decode_samples


class OneStepPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A student of one step or a few.

    Args:
        network: a network of any family that fdistill reads.
        scheduler: its config says what the network predicts; None for networks whose own config says it.
        vae: the autoencoder of a latent student.
        student: the student's settings. They are one mapping because diffusers takes a list in a pipeline's config for
            a component. "levels" are the noise levels of the steps, falling; a one-step student has one. "null_class"
            is the label for "no class", where the network's config does not say it. "latent_scale", "latent_bias" and
            "pixel_range" are those of the `LatentScaling`.
    """

    _optional_components: ClassVar[list[str]] = ["scheduler", "vae"]
    model_cpu_offload_seq = "network->vae"
    #: Whether the pipeline is called with prompts.
    takes_prompts = False

    def __init__(
        self,
        network: ModelMixin,
        scheduler: SchedulerMixin = None,
        vae: AutoencoderKL = None,
        student: dict = None,  # type: ignore[assignment, type-arg]  # noqa: RUF013
    ):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(student=dict(student or {}))

    def _generator(self) -> Student:
        denoiser = wrap(self.network, None if self.scheduler is None else scheduler_config(self.scheduler))
        settings = self.config.student
        set_null_class(denoiser, settings.get("null_class"))
        return student_generator(denoiser, settings.get("levels", ())).eval()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images, with one network evaluation each, or as many as the student was trained for.

        Args:
            batch_size: number of images; ignored if there are labels, which give one image each.
            class_labels: one label for each image; None for an unconditional student.
            generator: draws the noise.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).

        Raises:
            ArgumentError: labels are missing, outside the student's classes, or given to an unconditional student.
        """
        student = self._generator()
        device = self._execution_device
        labels = None
        if student.num_classes is not None:
            if class_labels is None:
                raise ArgumentError(f"class_labels: expected labels in [0, {student.num_classes}), got None")
            labels = torch.as_tensor(class_labels, device=device).reshape(-1)
            batch_size = len(labels)
            if not bool(((labels >= 0) & (labels < student.num_classes)).all()):
                raise ArgumentError(
                    f"class_labels: expected labels in [0, {student.num_classes}), got {labels.tolist()}"
                )
        elif class_labels is not None:
            raise ArgumentError("class_labels: this student is unconditional; expected None")
        noise = randn_tensor((batch_size, *student.noise_shape()), generator=generator, device=device)
        samples = student(noise, labels)
        scaling = student.denoiser.latent_scaling  # of a network whose own config says it
        if scaling is None and self.vae is not None:
            scaling = LatentScaling.from_settings(self.config.student)
        return pipeline_output(self, samples, scaling, output_type, return_dict)


def pipeline_output(
    pipeline: Any, samples: torch.Tensor, scaling: LatentScaling | None, output_type: str, return_dict: bool
) -> ImagePipelineOutput | tuple[Any]:
    """What a pipeline of fdistill returns for a student's samples [B, C, H, W].

    Args:
        scaling: of the latents of the pipeline's autoencoder; None for samples of pixels.
    """
    if scaling is not None:
        samples = decode_samples(pipeline.vae, scaling, samples)
    images: Any = (samples / 2 + 0.5).clamp(0, 1)
    if output_type != "pt":
        images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = pipeline.numpy_to_pil(images)
    pipeline.maybe_free_model_hooks()
    return ImagePipelineOutput(images=images) if return_dict else (images,)


# `DiffusionPipeline.from_pretrained` looks up the class named in model_index.json as an attribute of diffusers.
diffusers.OneStepPipeline = OneStepPipeline

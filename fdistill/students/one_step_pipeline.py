"""`OneStepPipeline` runs the students that no pipeline class of diffusers can run; diffusers loads its folders."""

# No `from __future__ import annotations`: diffusers compares a pipeline's components with the classes in its
# constructor's annotations, and older versions understand only plain classes there.

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from fdistill.adapters import set_null_class, wrap
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.denoiser import LatentScaling
from fdistill.generator import Student, student_generator
from fdistill.students.student_pipeline import StudentPipeline


class OneStepPipeline(StudentPipeline):
    """A student of one step or a few.

    Args:
        network: a network of any family that fdistill reads.
        scheduler: its config says what the network predicts; None for networks whose own config says it.
        vae: the autoencoder of a latent student.
        student: the student's settings. They are one mapping because diffusers takes a list in a pipeline's config for
            a component. "levels" are the noise levels of the steps, falling; a one-step student has one. "sampler" is
            that of a `FewStepGenerator`. "null_class" is the label for "no class", where the network's config does not
            say it. "latent_scale", "latent_bias" and "pixel_range" are those of the `LatentScaling`.
    """

    _optional_components: ClassVar[list[str]] = ["scheduler", "vae"]
    model_cpu_offload_seq = "network->vae"

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

    def make_student(self) -> Student:
        denoiser = wrap(self.network, None if self.scheduler is None else scheduler_config(self.scheduler))
        settings = self.config.student
        set_null_class(denoiser, settings.get("null_class"))
        return student_generator(denoiser, settings.get("levels", ()), settings.get("sampler", "stochastic")).eval()

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
        student = self.make_student()
        device = self._execution_device
        labels = self._labels(student, class_labels, device)
        count = batch_size if labels is None else len(labels)
        noise = randn_tensor((count, *student.noise_shape()), generator=generator, device=device)
        samples = student(noise, labels)
        scaling = student.denoiser.latent_scaling  # of a network whose own config says it
        if scaling is None and self.vae is not None:
            scaling = LatentScaling.from_settings(self.config.student)
        return self._images(samples, scaling, output_type, return_dict)


# `DiffusionPipeline.from_pretrained` looks up the class named in model_index.json as an attribute of diffusers.
diffusers.OneStepPipeline = OneStepPipeline

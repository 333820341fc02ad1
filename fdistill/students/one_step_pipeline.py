"""`OneStepPipeline`: students that no pipeline of diffusers runs, in a folder that diffusers loads."""

# No `from __future__ import annotations`: diffusers compares a pipeline's components with the classes that its
# constructor is annotated with, and older versions know plain classes alone.

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
from fdistill.teachers.autoencoder import decode_latents


class OneStepPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A student of one step or a few.

    Args:
        network: of any family that fdistill reads.
        scheduler: whose config says what the network predicts; None for networks that say it themselves.
        vae: of a latent student.
        student: how they are used, in one mapping because diffusers takes lists in a pipeline's config for components:
            "levels", the falling noise levels of its steps, one for a one-step student; "null_class", the label that
            stands for no class, where the network's config does not say it; "latent_scale" and "latent_bias", for each
            channel of the autoencoder's latents, what makes samples of them.
    """

    _optional_components: ClassVar[list[str]] = ["scheduler", "vae"]
    model_cpu_offload_seq = "network->vae"
    #: Whether prompts are what it is called with.
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
        """Images in one evaluation each, or the few the student was trained for.

        Args:
            batch_size: how many; with labels, one for each of them.
            class_labels: one for each image; None for an unconditional student.
            generator: of the noise.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).

        Raises:
            ArgumentError: labels missing, unasked for, or beyond the student's classes.
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
        return pipeline_output(self, samples, output_type, return_dict)


def pipeline_output(
    pipeline: Any, samples: torch.Tensor, output_type: str, return_dict: bool
) -> ImagePipelineOutput | tuple[Any]:
    """What a pipeline of ours returns for a student's samples [B, C, H, W]; its settings say what latents they are."""
    if pipeline.vae is not None:
        scaling = LatentScaling(pipeline.config.student["latent_scale"], pipeline.config.student["latent_bias"])
        samples = decode_latents(pipeline.vae, scaling.to_latents(samples).to(pipeline.vae.dtype))
    images: Any = (samples / 2 + 0.5).clamp(0, 1)
    if output_type != "pt":
        images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = pipeline.numpy_to_pil(images)
    pipeline.maybe_free_model_hooks()
    return ImagePipelineOutput(images=images) if return_dict else (images,)


# `DiffusionPipeline.from_pretrained` looks a pipeline's class up in diffusers, by the name in model_index.json.
diffusers.OneStepPipeline = OneStepPipeline

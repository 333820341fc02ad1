"""`TiUEPipeline` runs students with one encoder and several decoders; diffusers loads its folders."""

# No `from __future__ import annotations`: diffusers compares a pipeline's components with the classes in its
# constructor's annotations, and older versions understand only plain classes there.

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fdistill.adapters import set_null_class, unet2d_condition, wrap
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.denoiser import LatentScaling
from fdistill.students.student_pipeline import StudentPipeline, pipeline_settings
from fdistill.students.tiue import TiUEGenerator
from fdistill.teachers.autoencoder import pixels_per_latent


class TiUEPipeline(StudentPipeline):
    """A `TiUEGenerator` with its text encoders and autoencoder, if it has any.

    The student takes prompts (with the encoders of Stable Diffusion 1, 2 or XL), class labels, or neither.

    Args:
        unet: a `UNet2DModel` or `UNet2DConditionModel`.
        scheduler: its config says what the UNet predicts; the scheduler itself is not run.
        vae: the autoencoder of a latent student.
        text_encoder, tokenizer, text_encoder_2, tokenizer_2: those of a text-to-image student.
        student: the student's settings. They are one mapping because diffusers takes a list in a pipeline's config for
            a component. "decoder_levels" are the decoders' noise levels, falling. "size" is the height and width of the
            UNet's samples. "null_class" is the label for "no class". "latent_scale", "latent_bias" and
            "pixel_range" are those of the `LatentScaling`.
    """

    _optional_components: ClassVar[list[str]] = [
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
    ]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->vae"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["unet"]  # the offload hook is in forward, which is not called

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL = None,
        text_encoder: CLIPTextModel = None,  # type: ignore[assignment]
        tokenizer: CLIPTokenizer = None,  # type: ignore[assignment]
        text_encoder_2: CLIPTextModelWithProjection = None,  # type: ignore[assignment]
        tokenizer_2: CLIPTokenizer = None,  # type: ignore[assignment]
        student: dict = None,  # type: ignore[assignment, type-arg]  # noqa: RUF013
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(student=dict(student or {}))

    @property
    def takes_prompts(self) -> bool:
        """Whether the pipeline is called with prompts."""
        return self.text_encoder is not None

    def make_student(self) -> TiUEGenerator:
        denoiser = wrap(self.unet, scheduler_config(self.scheduler))
        settings = self.config.student
        if denoiser.text_shapes is not None and "size" in settings:
            denoiser.resize(settings["size"], settings["size"])
        set_null_class(denoiser, settings.get("null_class"))
        return TiUEGenerator(denoiser, settings.get("decoder_levels", ())).eval()

    def _encoders(self) -> DiffusionPipeline:
        """The family's own pipeline with text encoders only, which encodes prompts as in training."""
        nothing = {"vae": None, "unet": None, "scheduler": None}
        if self.text_encoder_2 is not None:
            return StableDiffusionXLPipeline(
                **nothing,
                text_encoder=self.text_encoder,
                text_encoder_2=self.text_encoder_2,
                tokenizer=self.tokenizer,
                tokenizer_2=self.tokenizer_2,
                add_watermarker=False,
            )
        return StableDiffusionPipeline(
            **nothing,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float = 0.0,
        batch_size: int | None = None,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images with one evaluation of the encoder and one batched evaluation of the decoders.

        Args:
            prompt: one for each image; None for a student that takes no prompts.
            num_inference_steps: must be 1; it exists so that one-step students of all classes are called alike.
            guidance_scale: at most 1, as the student was trained with its teacher's guidance and is not guided itself.
            batch_size: number of images if there are no prompts or labels; by default that of `latents`, or 1.
            class_labels: one for each image; None for a student that takes no class labels.
            generator: draws the noise.
            latents: [B, C, h, w] standard normal noise to use instead of drawing some.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).

        Raises:
            ArgumentError: a condition is missing or one that this student does not take, the noise has the wrong shape,
                or the call demands several steps or guidance.
        """
        if num_inference_steps != 1:
            raise ArgumentError(f"num_inference_steps: got {num_inference_steps}; this student takes 1")
        if guidance_scale > 1:
            raise ArgumentError(
                f"guidance_scale: got {guidance_scale:g}; this student was trained with its teacher's guidance and "
                "takes none; expected 0"
            )
        student = self.make_student()
        device = self._execution_device
        condition, count = self._condition(student, prompt, class_labels, device)
        count = count or batch_size or (1 if latents is None else len(latents))
        shape = (count, *student.sample_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        elif latents.shape != shape:
            raise ArgumentError(f"latents: expected noise of shape {shape}, got {tuple(latents.shape)}")
        samples = student(latents.to(device), condition)
        scaling = None if self.vae is None else LatentScaling.from_settings(self.config.student)
        return self._images(samples, scaling, output_type, return_dict)

    def _condition(
        self,
        student: TiUEGenerator,
        prompt: str | Sequence[str] | None,
        class_labels: Sequence[int] | torch.Tensor | None,
        device: torch.device,
    ) -> tuple[Condition | None, int | None]:
        """The student's condition, and the number of images it is for (None for an unconditional student)."""
        if (prompt is None) != (self.text_encoder is None):
            takes = "takes no prompts; expected None" if self.text_encoder is None else "takes prompts; got None"
            raise ArgumentError(f"prompt: this student {takes}")
        labels = self._labels(student, class_labels, device)
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            pixels = student.sample_shape[-1] * pixels_per_latent(self.vae)
            condition = unet2d_condition.encode_prompts(self._encoders(), prompts, pixels)
            return condition.to(device), len(prompts)
        return labels, None if labels is None else len(labels)


def tiue_pipeline(
    generator: TiUEGenerator,
    scheduler: SchedulerMixin,
    vae: AutoencoderKL | None,
    text: Mapping[str, Any],
) -> TiUEPipeline:
    """Wraps a student in a pipeline that can be saved.

    Args:
        generator: the student, holding the weights to export.
        scheduler: the teacher's scheduler.
        vae: the autoencoder of a latent student, whose denoiser has a `latent_scaling`.
        text: the teacher's text encoders and tokenizers by component name; empty for a student that takes no prompts.
    """
    denoiser = generator.denoiser
    levels, size = list(generator.decoder_levels), generator.sample_shape[-1]
    settings = pipeline_settings(denoiser, decoder_levels=levels, size=size)
    return TiUEPipeline(denoiser.network, scheduler, vae, **text, student=settings)


# `DiffusionPipeline.from_pretrained` looks up the class named in model_index.json as an attribute of diffusers.
diffusers.TiUEPipeline = TiUEPipeline

"""`TiUEPipeline`: students with one encoder and several decoders, in a folder that diffusers loads."""

# No `from __future__ import annotations`: diffusers compares a pipeline's components with the classes that its
# constructor is annotated with, and older versions know plain classes alone.

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
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.students.one_step_pipeline import pipeline_output
from fdistill.students.tiue import TiUEGenerator
from fdistill.teachers.autoencoder import pixels_per_latent


class TiUEPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A `TiUEGenerator` with what surrounds it: text-to-image with the encoders of Stable Diffusion 1, 2 or XL, images
    of classes, or of neither.

    Args:
        unet: a `UNet2DModel` or `UNet2DConditionModel`.
        scheduler: whose config says what the UNet predicts; it runs no step.
        vae: of a latent student.
        text_encoder, tokenizer, text_encoder_2, tokenizer_2: of a text-to-image student.
        student: how they are used, in one mapping because diffusers takes lists in a pipeline's config for components:
            "decoder_levels", falling; "size", height and width of the UNet's samples; "null_class", the label that
            stands for no class; "latent_scale" and "latent_bias", for each channel of the autoencoder's latents, what
            makes samples of them.
    """

    _optional_components: ClassVar[list[str]] = [
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
    ]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->vae"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["unet"]  # whose forward, where the hook would be, is not called

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
        """Whether prompts are what it is called with."""
        return self.text_encoder is not None

    def _generator(self) -> TiUEGenerator:
        denoiser = wrap(self.unet, scheduler_config(self.scheduler))
        settings = self.config.student
        if isinstance(denoiser, TextDenoiser) and "size" in settings:
            denoiser.resize(settings["size"])
        set_null_class(denoiser, settings.get("null_class"))
        return TiUEGenerator(denoiser, settings.get("decoder_levels", ())).eval()

    def _encoders(self) -> DiffusionPipeline:
        """The family's own pipeline, without what it draws with: it encodes prompts as in training."""
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
        """Images in one evaluation of the encoder and one of the decoders.

        Args:
            prompt: one for each image; None for a student that is told none.
            num_inference_steps: 1, as one-step students of other classes are called.
            guidance_scale: at most 1: what guidance the teacher had was learnt.
            batch_size: how many, where neither prompts nor labels say it: 1, or as many as `latents`.
            class_labels: one for each image; None for a student that is told none.
            generator: of the noise.
            latents: [B, C, h, w] standard normal noise to use instead.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).

        Raises:
            ArgumentError: a condition that is missing or unasked for, or a call for more than this student does.
        """
        if num_inference_steps != 1:
            raise ArgumentError(f"num_inference_steps: got {num_inference_steps}; this student takes 1")
        if guidance_scale > 1:
            raise ArgumentError(
                f"guidance_scale: got {guidance_scale:g}; this student learnt its teacher's guidance, expected 0"
            )
        student = self._generator()
        device = self._execution_device
        condition, count = self._condition(student, prompt, class_labels, device)
        count = count or batch_size or (1 if latents is None else len(latents))
        shape = (count, *student.sample_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        elif latents.shape != shape:
            raise ArgumentError(f"latents: expected noise of shape {shape}, got {tuple(latents.shape)}")
        samples = student(latents.to(device), condition)
        return pipeline_output(self, samples, output_type, return_dict)

    def _condition(
        self,
        student: TiUEGenerator,
        prompt: str | Sequence[str] | None,
        class_labels: Sequence[int] | torch.Tensor | None,
        device: torch.device,
    ) -> tuple[Condition | None, int | None]:
        """What the student is told, and of how many images it speaks."""
        if (prompt is None) != (self.text_encoder is None):
            told = "is told no prompts; expected None" if self.text_encoder is None else "is told prompts; got None"
            raise ArgumentError(f"prompt: this student {told}")
        if class_labels is not None and student.num_classes is None:
            raise ArgumentError("class_labels: this student is told none; expected None")
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            pixels = student.sample_shape[-1] * pixels_per_latent(self.vae)
            condition = unet2d_condition.encode_prompts(self._encoders(), prompts, pixels)
            return condition.to(device), len(prompts)
        if student.num_classes is None:
            return None, None
        labels = torch.as_tensor([] if class_labels is None else class_labels, device=device).reshape(-1)
        if class_labels is None or not bool(((labels >= 0) & (labels < student.num_classes)).all()):
            got = None if class_labels is None else labels.tolist()
            raise ArgumentError(f"class_labels: expected labels in [0, {student.num_classes}), got {got}")
        return labels, len(labels)


def tiue_pipeline(
    generator: TiUEGenerator,
    scheduler: SchedulerMixin,
    vae: AutoencoderKL | None,
    text: Mapping[str, Any],
) -> TiUEPipeline:
    """A student as a pipeline to save.

    Args:
        generator: the student, holding the weights to export.
        scheduler: of the teacher.
        vae: of a latent student, whose denoiser has a `latent_scaling`.
        text: the teacher's text encoders and tokenizers, by the names they have as components; empty for a student that
            is told no prompts.
    """
    denoiser: Any = generator.denoiser
    settings: dict[str, Any] = {
        "decoder_levels": list(generator.decoder_levels),
        "size": generator.sample_shape[-1],
        "null_class": denoiser.null_class,
    }
    if denoiser.latent_scaling is not None:
        scale, bias = denoiser.latent_scaling
        settings |= {"latent_scale": list(scale), "latent_bias": list(bias)}
    return TiUEPipeline(denoiser.network, scheduler, vae, **text, student=settings)


# `DiffusionPipeline.from_pretrained` looks a pipeline's class up in diffusers, by the name in model_index.json.
diffusers.TiUEPipeline = TiUEPipeline

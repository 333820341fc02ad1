"""The interface of a family of teachers, used by all code that loads, exports or tries out its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin

from fdistill.adapters.original_names import Layout
from fdistill.base.errors import ArgumentError
from fdistill.condition import TextCondition
from fdistill.denoiser import Denoiser

__all__ = ["Family", "TextToImage"]

#: Names of a network's tensors -> their shapes.
Shapes = Mapping[str, tuple[int, ...]]
#: A pipeline of diffusers that runs a student, and the arguments to call it with.
Runnable = tuple[DiffusionPipeline, dict[str, Any]]


def no_native_pipeline(
    denoiser: Denoiser, levels: Sequence[float], index: Mapping[str, Any], vae: AutoencoderKL | None
) -> Runnable | None:
    """The `Family.native_pipeline` of networks that no pipeline of diffusers can run in one step: always None."""
    return None


def no_embedded_guidance(network: Any, scale: float) -> None:
    """The `TextToImage.fold_guidance` of networks that take no guidance scale: raises ArgumentError."""
    raise ArgumentError(f"network: {type(network).__name__} has no guidance embedding to fold into its weights")


def no_template(pipeline: Any) -> int:
    """The `TextToImage.tokens_before` of pipelines whose limits count the prompt alone: always 0."""
    return 0


def chat_tokens(pipeline: Any) -> int:
    """The `TextToImage.tokens_before` of pipelines that put prompts into a chat, some after a system message."""
    prompt, system = "the prompt itself", getattr(pipeline, "system_message", None)
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if system is not None:
        texts = {"system": system, "user": prompt}
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    text = pipeline.tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
    return len(tokenizer(text[: text.index(prompt)], add_special_tokens=False).input_ids)


def own_pipeline_class(index: Mapping[str, Any]) -> str:
    """The `TextToImage.encoding_pipeline` of families whose students keep the class of their teacher's pipeline."""
    return str(index.get("_class_name"))


@dataclass(frozen=True)
class TextToImage:
    """The additional parts of a family whose networks take prompts. The first three fields are required.

    Attributes:
        pipelines: names of the pipeline classes of diffusers whose checkpoints are supported. Other pipelines may hold
            a network of the same class and feed it different inputs, so they are refused.
        tokenizers: name of each tokenizer in these pipelines -> number of tokens that it reads of a prompt; None if
            the tokenizer's own limit holds.
        encode_prompts: `(pipeline, prompts, resolution) -> TextCondition`, the inputs that the pipeline feeds its
            network for B prompts and square images of `resolution` pixels. The pipeline has its encoders and
            tokenizers, but no network and no autoencoder.
        encode_negative: `(pipeline, negative_prompt, resolution) -> TextCondition` of one prompt, for pipelines that
            encode the negative prompt differently from prompts; otherwise None. Callers use `encode_null`.
        unguided: arguments with which the pipelines sample without guidance and at exactly the requested size, as a
            student does.
        guidance_offset: what the pipelines' `guidance_scale` is beside the usual one, which means u + s (c - u): -1 for
            pipelines that mean c + g (c - u).
        fold_guidance: `(network, scale)`, changes a network that takes a guidance scale into one that takes none and
            behaves as under this scale. Required if denoisers have an `embedded_guidance`, unless there is a
            `guidance_argument`.
        guidance_argument: for networks whose guidance scale cannot be folded into their weights, the pipelines'
            argument for it, with which students are called; otherwise None.
        tokens_before: `pipeline -> number` of tokens that its chat template puts before a prompt. They count towards
            the tokenizers' limits, which then hold for prompts without the tokenizers' own special tokens.
        encoding_pipeline: `model_index.json -> name` of the class in `pipelines` that loads the text encoders and
            tokenizers of a folder. Required if a student's folder names a pipeline class of fdistill.
        student_index: entries that a student's model_index.json gets in place of its teacher's, where that has them.
        tiny: pipeline class -> a function `settings -> arguments` that returns the constructor's arguments for an
            untrained pipeline of a few thousand parameters; `settings` replace those of its tiny network. `--smoke`
            runs recipes on these pipelines.
    """

    pipelines: tuple[str, ...]
    tokenizers: Mapping[str, int | None]
    encode_prompts: Callable[[Any, Sequence[str], int], TextCondition]
    encode_negative: Callable[[Any, str, int], TextCondition] | None = None
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 0.0})
    guidance_offset: float = 0.0
    fold_guidance: Callable[[Any, float], None] = no_embedded_guidance
    guidance_argument: str | None = None
    tokens_before: Callable[[Any], int] = no_template
    encoding_pipeline: Callable[[Mapping[str, Any]], str] = own_pipeline_class
    student_index: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = field(default_factory=dict)

    def encode_null(self, pipeline: Any, negative_prompt: str, resolution: int) -> TextCondition:
        """The negative condition of guidance, one row: the encoded negative prompt, which may be empty."""
        if self.encode_negative is not None:
            return self.encode_negative(pipeline, negative_prompt, resolution)
        return self.encode_prompts(pipeline, [negative_prompt], resolution)


@dataclass(frozen=True)
class Family:
    """How the networks of one class are loaded and exported. The first two fields are required.

    Each family's file ends with its `FAMILY`, which `fdistill.adapters.FAMILIES` lists under the network's class.

    Attributes:
        network: the class, whose networks diffusers saves as config.json and safetensors.
        wrap: `(network, scheduler config or None) -> Denoiser`; raises CheckpointError if the two do not fit, or if
            such a network cannot be distilled. The denoiser keeps the network as its attribute `network`; if it also
            overrides `Denoiser.with_network`, students may be smaller than their teacher.
        native_pipeline: `(denoiser, levels, model_index.json, vae or None)` -> the pipeline of diffusers that runs a
            student at these levels, and the arguments to call it with. None if no pipeline does; the student is then
            saved as a `OneStepPipeline`. Not used for text-to-image students, which keep their teacher's pipeline.
        component: name of the network in the pipelines, and first part of the names in a LoRA file.
        text: the additional parts for text-to-image networks; None for networks that take labels or no condition.
        original_layout: `(names of the tensors, config) -> Layout`, maps the tensors to the names of the network's
            publisher, for LoRA files and single-file checkpoints; raises CheckpointError for a tensor without such a
            name. None if the publisher's names are not known.
        single_files: what people call the checkpoints of one file that hold such a network, as "Stable Diffusion 3" ->
            a function that recognises one by its tensors, under the publisher's names. These are the files that
            `from_single_file` of the network's class reads.
        comfy_lora: whose names ComfyUI reads in a LoRA file: "diffusers", "kohya" or "publisher", which are those of
            `original_layout`. None if it is not known to read any.
        original_variances: the last layer, where the publisher's network has learned variances behind the means.
            ComfyUI expects them in its files, and ignores them: an exported student has zeros there.
        comfy_checkpoint: "module:function", for families that ComfyUI reads as a whole checkpoint. The function takes
            the pipeline's folder and the network's tensors under their names in ComfyUI; it returns the tensors of the
            whole checkpoint, and notes that a user must read before loading it. It is named as text because
            `fdistill.formats` imports the families. None exports the network alone.
        earlier_config: recognises the config.json of such a network from a time when diffusers had another class for
            it. None if there was no such time.
        guidance_labels: pipeline class of diffusers -> the label that stands for no class in its guidance, if the class
            has a fixed one.
    """

    network: type[ModelMixin]
    wrap: Callable[[Any, Mapping[str, Any] | None], Denoiser]
    native_pipeline: Callable[[Any, Sequence[float], Mapping[str, Any], AutoencoderKL | None], Runnable | None] = (
        no_native_pipeline
    )
    component: str = "unet"
    text: TextToImage | None = None
    original_layout: Callable[[Collection[str], Mapping[str, Any]], Layout] | None = None
    single_files: Mapping[str, Callable[[Shapes], bool]] = field(default_factory=dict)
    comfy_lora: Literal["diffusers", "publisher", "kohya"] | None = None
    original_variances: str | None = None
    comfy_checkpoint: str | None = None
    earlier_config: Callable[[Mapping[str, Any]], bool] | None = None
    guidance_labels: Mapping[str, int] = field(default_factory=dict)

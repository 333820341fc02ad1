"""The protocol between a family of teachers and everything that reads, exports or tries out its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin

from fdistill.adapters.original_names import Layout
from fdistill.base.errors import ArgumentError
from fdistill.condition import TextCondition
from fdistill.denoiser import Denoiser

#: A pipeline of diffusers that runs a student, and the arguments it has to be called with.
Runnable = tuple[DiffusionPipeline, dict[str, Any]]


def no_native_pipeline(
    denoiser: Denoiser, levels: Sequence[float], index: Mapping[str, Any], vae: AutoencoderKL | None
) -> Runnable | None:
    """The `Family.native_pipeline` of networks that no pipeline of diffusers runs in one step."""
    return None


def no_embedded_guidance(network: Any, scale: float) -> None:
    """The `TextToImage.fold_guidance` of networks that are given no guidance scale: there is nothing to fold."""
    raise ArgumentError(f"network: {type(network).__name__} has no guidance embedding that could be folded")


def own_pipeline_class(index: Mapping[str, Any]) -> str:
    """The `TextToImage.encoding_pipeline` of families whose students keep the class of their teacher's pipeline."""
    return str(index.get("_class_name"))


@dataclass(frozen=True)
class TextToImage:
    """What a family adds whose networks are given prompts. The first three fields are required.

    Attributes:
        pipelines: names of the classes of diffusers whose checkpoints are read. Other pipelines may hold a network of
            the same class and feed it something else, so they are refused.
        tokenizers: names of the tokenizers in these pipelines, and how many tokens of a prompt each of them reads; None
            where the tokenizer says so itself.
        encode_prompts: `(pipeline, prompts, resolution) -> TextCondition`, what the pipeline feeds its network for B
            prompts and square images of `resolution` pixels. The pipeline has its encoders and tokenizers, but neither
            network nor autoencoder.
        encode_negative: `(pipeline, negative_prompt, resolution) -> TextCondition` of one prompt, for pipelines that
            encode the negative prompt otherwise than prompts; None where they do not. Callers use `encode_null`.
        unguided: arguments with which the pipelines sample without guidance and at exactly the size asked for, as a
            student does.
        fold_guidance: `(network, scale)`, makes a network that is given a guidance scale into one that is given none
            and acts as under this scale. Needed where denoisers have an `embedded_guidance`.
        encoding_pipeline: `model_index.json -> name`, which class of `pipelines` has the text encoders and tokenizers
            of a folder. Needed where a student's folder names a class of ours.
        tiny: class of pipeline -> `settings -> arguments` that it is constructed with to be an untrained pipeline of a
            few thousand parameters, given settings over those of its tiny network. `--smoke` runs recipes on them.
    """

    pipelines: tuple[str, ...]
    tokenizers: Mapping[str, int | None]
    encode_prompts: Callable[[Any, Sequence[str], int], TextCondition]
    encode_negative: Callable[[Any, str, int], TextCondition] | None = None
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 0.0})
    fold_guidance: Callable[[Any, float], None] = no_embedded_guidance
    encoding_pipeline: Callable[[Mapping[str, Any]], str] = own_pipeline_class
    tiny: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = field(default_factory=dict)

    def encode_null(self, pipeline: Any, negative_prompt: str, resolution: int) -> TextCondition:
        """What guidance leads away from, as one prompt: a negative prompt, or the empty one."""
        if self.encode_negative is not None:
            return self.encode_negative(pipeline, negative_prompt, resolution)
        return self.encode_prompts(pipeline, [negative_prompt], resolution)


@dataclass(frozen=True)
class Family:
    """How the networks of one class are read. The first two fields are required.

    Each file of a family ends with its `FAMILY`, which `fdistill.adapters.FAMILIES` lists under the network's class.

    Attributes:
        network: the class, with config.json and safetensors as diffusers saves them.
        wrap: `(network, scheduler config or None) -> Denoiser`; raises CheckpointError where the two do not fit, or the
            network is of a kind that cannot be distilled.
        native_pipeline: `(denoiser, levels, model_index.json, vae or None)`, the pipeline of diffusers that runs a
            student at these levels, with the arguments it has to be called with; None where there is none, and the
            student is saved as a `OneStepPipeline`. A text-to-image student keeps its teacher's pipeline instead.
        component: what the pipelines call the network, and what the names in a LoRA file begin with.
        text: what text-to-image networks add; None for networks that are given labels or nothing.
        original_layout: `(names of the tensors, config) -> Layout`, the tensors under the names of the network's
            publisher, for LoRA files and single-file checkpoints with these names; raises CheckpointError for a tensor
            without one. None where they are not known.
        original_variances: the publisher's network has twice as many output as input channels, and ComfyUI expects all
            of them.
    """

    network: type[ModelMixin]
    wrap: Callable[[Any, Mapping[str, Any] | None], Denoiser]
    native_pipeline: Callable[[Any, Sequence[float], Mapping[str, Any], AutoencoderKL | None], Runnable | None] = (
        no_native_pipeline
    )
    component: str = "unet"
    text: TextToImage | None = None
    original_layout: Callable[[Collection[str], Mapping[str, Any]], Layout] | None = None
    original_variances: bool = False

"""ComfyUI workflows that load an exported student and sample it at the levels that it was trained for.

A workflow is in ComfyUI's API format, {node's number: {"class_type", "inputs"}}, in which an input is a value or
[node's number, output]. All nodes are of ComfyUI itself; ManualSigmas is there since the end of 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fdistill.adapters.lumina2 import INSTRUCTION

Workflow = dict[str, dict[str, Any]]
Output = tuple[str, int]

#: Pipelines whose base is one checkpoint with network, text encoders and autoencoder -> the name of its file.
_CHECKPOINTS = {
    "StableDiffusionPipeline": "v1-5-pruned-emaonly.safetensors",
    "StableDiffusionXLPipeline": "sd_xl_base_1.0.safetensors",
}
_T5, _CLIP_L = "t5xxl_fp16.safetensors", "clip_l.safetensors"


@dataclass(frozen=True)
class _Parts:
    """The files of a pipeline that comes in parts, under the names that ComfyUI's own templates give them.

    Attributes:
        network: of the base model.
        encoders: the class of the node that loads text encoders, and its inputs.
        latent: the class of the node that makes empty latents.
    """

    network: str
    encoders: tuple[str, dict[str, str]]
    autoencoder: str
    latent: str = "EmptySD3LatentImage"


def _encoder(name: str, kind: str) -> tuple[str, dict[str, str]]:
    return "CLIPLoader", {"clip_name": name, "type": kind}


_PARTS = {
    "StableDiffusion3Pipeline": _Parts(
        "sd3.5_medium.safetensors",
        (
            "TripleCLIPLoader",
            {"clip_name1": _CLIP_L, "clip_name2": "clip_g.safetensors", "clip_name3": _T5},
        ),
        "sd3_vae.safetensors",
    ),
    "FluxPipeline": _Parts(
        "flux1-dev.safetensors",
        ("DualCLIPLoader", {"clip_name1": _T5, "clip_name2": _CLIP_L, "type": "flux"}),
        "ae.safetensors",
    ),
    "QwenImagePipeline": _Parts(
        "qwen_image_bf16.safetensors",
        _encoder("qwen_2.5_vl_7b.safetensors", "qwen_image"),
        "qwen_image_vae.safetensors",
    ),
    "ZImagePipeline": _Parts(
        "z_image_bf16.safetensors", _encoder("qwen_3_4b.safetensors", "lumina2"), "ae.safetensors"
    ),
    "Flux2KleinPipeline": _Parts(
        "flux-2-klein-base-4b.safetensors",
        _encoder("qwen_3_4b.safetensors", "flux2"),
        "flux2-vae.safetensors",
        "EmptyFlux2LatentImage",
    ),
    "Flux2Pipeline": _Parts(
        "flux2-dev.safetensors",
        _encoder("mistral_3_small_flux2_bf16.safetensors", "flux2"),
        "flux2-vae.safetensors",
        "EmptyFlux2LatentImage",
    ),
    "Lumina2Pipeline": _Parts(
        "lumina_2_model_bf16.safetensors", _encoder("gemma_2_2b_fp16.safetensors", "lumina2"), "ae.safetensors"
    ),
    "PixArtAlphaPipeline": _Parts(
        "PixArt-XL-2-1024-MS.safetensors", _encoder(_T5, "pixart"), "vae-ft-mse.safetensors", "EmptyLatentImage"
    ),
    "PixArtSigmaPipeline": _Parts(
        "PixArt-Sigma-XL-2-1024-MS.safetensors", _encoder(_T5, "pixart"), "sdxl_vae.safetensors", "EmptyLatentImage"
    ),
}


@dataclass(frozen=True)
class ComfySampling:
    """How ComfyUI samples a student.

    Attributes:
        sampler: "lcm" adds new noise between steps, "euler" the noise that a step implies.
        sigmas: of the steps in ComfyUI's measure, falling, without the 0 at the end.
        guidance: the scale that the network takes as an input; None for one that takes none.
    """

    sampler: Literal["lcm", "euler"]
    sigmas: Sequence[float]
    guidance: float | None = None

    def listed(self, first: int = 0, end: int | None = None) -> str:
        """The sigmas of some of the steps, and the one that the last of them leads to, as ManualSigmas reads them."""
        ends = [*(f"{sigma:.6g}" for sigma in self.sigmas), "0"]
        return ", ".join(ends[first : len(ends) if end is None else end + 1])


def workflow(
    pipeline: str,
    file: str,
    *,
    adapters: bool,
    phases: Sequence[tuple[str, int]] = (),
    sampling: ComfySampling,
    size: int,
    prompt: str,
    merged: tuple[str, float] | None = None,
) -> Workflow | None:
    """The workflow of an exported file; None for a pipeline that ComfyUI's own nodes do not load.

    Args:
        pipeline: class name of the student's pipeline.
        file: the name of the exported file.
        adapters: whether the file is a LoRA for the base model, instead of weights.
        phases: the files of LoRAs that take one after another of the steps, and how many each takes; `file` is then
            the name of the images alone.
        size: height and width of images in pixels.
        merged: the file and the scale of a LoRA that was merged into the teacher. Adapters need it beside them; weights
            of a network alone have it in them, but the text encoders do not.
    """
    nodes = _Nodes()
    if pipeline in _CHECKPOINTS:
        base = nodes.add("CheckpointLoaderSimple", ckpt_name=_CHECKPOINTS[pipeline] if adapters else file)
        model, encoders, autoencoder, latent = base, (base[0], 1), (base[0], 2), "EmptyLatentImage"
    elif pipeline in _PARTS:
        parts = _PARTS[pipeline]
        model = nodes.add("UNETLoader", unet_name=parts.network if adapters else file, weight_dtype="default")
        encoders = nodes.add(parts.encoders[0], **parts.encoders[1])
        autoencoder, latent = nodes.add("VAELoader", vae_name=parts.autoencoder), parts.latent
    else:
        return None
    if merged is not None and (adapters or pipeline in _PARTS):
        name, scale = merged
        strengths = {"strength_model": scale if adapters else 0.0, "strength_clip": scale}
        model = nodes.add("LoraLoader", model=model, clip=encoders, lora_name=name, **strengths)
        encoders = (model[0], 1)
    condition = _encoded(nodes, pipeline, encoders, prompt, size)
    if sampling.guidance is not None:
        condition = nodes.add("FluxGuidance", conditioning=condition, guidance=sampling.guidance)
    samples = nodes.add(latent, width=size, height=size, batch_size=1)
    first, sampler = 0, nodes.add("KSamplerSelect", sampler_name=sampling.sampler)
    for number, (name, count) in enumerate(phases or [(file, len(sampling.sigmas))]):
        expert = model
        if adapters:
            expert = nodes.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
        samples = nodes.add(
            "SamplerCustom",
            model=expert,
            add_noise=not number,  # a later phase gets what the one before it has noised already
            noise_seed=number,
            cfg=1.0,
            positive=condition,
            negative=condition,  # not evaluated with cfg 1
            sampler=sampler,
            sigmas=nodes.add("ManualSigmas", sigmas=sampling.listed(first, first + count)),
            latent_image=samples,
        )
        first += count
    images = nodes.add("VAEDecode", samples=samples, vae=autoencoder)
    nodes.add("SaveImage", images=images, filename_prefix=file.removesuffix(".safetensors"))
    return nodes.found


class _Nodes:
    """Collects nodes under numbers, each before those that read it."""

    def __init__(self) -> None:
        self.found: Workflow = {}

    def add(self, class_type: str, **inputs: Any) -> Output:
        """Adds a node; returns its first output."""
        number = str(len(self.found) + 1)
        self.found[number] = {"class_type": class_type, "inputs": inputs}
        return number, 0


def _encoded(nodes: _Nodes, pipeline: str, encoders: Output, prompt: str, size: int) -> Output:
    """The encoded prompt, with the sizes of an uncropped image where the network takes them."""
    if pipeline == "StableDiffusionXLPipeline":
        sizes = {f"{name}{side}": size for name in ("", "target_") for side in ("width", "height")}
        crop = {"crop_w": 0, "crop_h": 0}
        return nodes.add("CLIPTextEncodeSDXL", clip=encoders, text_g=prompt, text_l=prompt, **sizes, **crop)
    if pipeline == "PixArtAlphaPipeline":
        return nodes.add("CLIPTextEncodePixArtAlpha", clip=encoders, text=prompt, width=size, height=size)
    if pipeline == "Lumina2Pipeline":
        prompt = f"{INSTRUCTION} {prompt}"
    return nodes.add("CLIPTextEncode", clip=encoders, text=prompt)

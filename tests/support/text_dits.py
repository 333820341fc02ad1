"""What transformers with one large text encoder compute, when they are called as their pipelines call them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn

from fdistill.adapters import lumina2, pixart, wrap
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.condition import TextCondition
from fdistill.students.lora import lora_copy
from fdistill.training.activation_checkpointing import checkpoint_activations
from support.text_families_dit import (
    HAS_QWEN_IMAGE,
    HAS_Z_IMAGE,
    pixart_transformer,
    qwen_transformer,
    sana_transformer,
)
from support.text_families_flux2 import HAS_FLUX2, own_flux2_output
from support.text_pipelines import SIZE

if HAS_QWEN_IMAGE:
    from diffusers import QwenImagePipeline
if HAS_Z_IMAGE:
    from fdistill.adapters import z_image
if HAS_FLUX2:
    from fdistill.adapters import flux2

#: Families that predict eps at timesteps; the others are flows.
VP = ("pixart", "pixart-alpha")
#: Families whose networks attend to the padding of prompts, and whose pixels of latents are tokens.
FLUX2 = ("flux2-klein", "flux2-dev")


def tiny(name: str) -> TextDenoiser:
    """A denoiser of the family without its pipeline."""
    if name in VP:
        size = 128 if name == "pixart-alpha" else 8
        network, scheduler = pixart_transformer(sample_size=size), DPMSolverMultistepScheduler()
    elif name == "qwen-image":
        network, scheduler = qwen_transformer(), FlowMatchEulerDiscreteScheduler()
    elif name == "lumina2":
        network, scheduler = lumina2.tiny_transformer(), FlowMatchEulerDiscreteScheduler()
    elif name == "z-image":
        network, scheduler = z_image.tiny_transformer(), FlowMatchEulerDiscreteScheduler()
    elif name in FLUX2:
        guided = name == "flux2-dev"
        network, scheduler = flux2.tiny_transformer(guidance_embeds=guided), FlowMatchEulerDiscreteScheduler()
    else:
        changes = {"timestep_scale": 0.001} if name == "sana-timestep-scale" else {}
        network, scheduler = sana_transformer(**changes), FlowMatchEulerDiscreteScheduler()
    denoiser: Any = wrap(network, scheduler_config(scheduler))
    denoiser.resize(SIZE, SIZE)
    return denoiser


def inputs(denoiser: TextDenoiser, count: int = 3) -> tuple[Tensor, Tensor, TextCondition]:
    torch.manual_seed(3)
    tensors = {key: torch.randn(count, *shape) for key, shape in denoiser.text_shapes.items()}
    for key in tensors:
        if "mask" in key:
            lengths = torch.tensor([20, 7, 1])[:count, None]
            tensors[key] = (torch.arange(tensors[key].shape[1]) < lengths).long()
    t = torch.tensor([1.0, 0.6, 0.02])[:count] * (999.0 if isinstance(denoiser, pixart.PixArtDenoiser) else 1.0)
    return torch.randn(count, *denoiser.sample_shape), t.round() if t[0] > 1 else t, TextCondition(tensors)


def blocks_of(denoiser: TextDenoiser) -> tuple[str, list[nn.Module], nn.Module]:
    """The name of the network's first list of blocks, all its blocks, and its last layer."""
    network: Any = denoiser.network
    if isinstance(network, Lumina2Transformer2DModel):
        return "layers", list(network.layers), network.norm_out
    if hasattr(network, "all_final_layer"):
        return "layers", list(network.layers), network.all_final_layer["2-1"]
    blocks = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]
    return "transformer_blocks", blocks, network.proj_out


def own_output(network: Any, x_t: Tensor, t: Tensor, condition: TextCondition) -> Any:
    """What the transformer says when it is called as its pipeline calls it, [B, C, H, W]."""
    if isinstance(network, PixArtTransformer2DModel):
        sizes = ("resolution", "aspect_ratio")
        told = {key: condition[key] if network.config.sample_size == 128 else None for key in sizes}
        return network(
            x_t,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=t.long(),
            added_cond_kwargs=told,
        ).sample
    if type(network).__name__.startswith("Sana"):
        return network(
            x_t,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=(1000 * t) * network.config.timestep_scale,
        ).sample
    if isinstance(network, Lumina2Transformer2DModel):
        given = x_t, 1 - t, condition["prompt_embeds"], condition["prompt_attention_mask"]
        return -Lumina2Transformer2DModel.forward(network, *given).sample
    if type(network).__name__.startswith("ZImage"):
        lengths = condition["prompt_embeds_mask"].sum(1).tolist()
        captions = [each[:length] for each, length in zip(condition["prompt_embeds"], lengths, strict=True)]
        return -torch.stack(network(list(x_t[:, :, None]), 1 - t, captions, return_dict=False)[0])[:, :, 0]
    if type(network).__name__.startswith("Flux2"):
        return own_flux2_output(network, x_t, t, condition["prompt_embeds"])
    count, channels, height, width = x_t.shape
    tokens = network(
        hidden_states=QwenImagePipeline._pack_latents(x_t, count, channels, height, width),
        timestep=t,
        encoder_hidden_states_mask=condition["prompt_embeds_mask"],
        encoder_hidden_states=condition["prompt_embeds"],
        img_shapes=[[(1, height // 2, width // 2)]] * count,
    ).sample
    return unpacked(tokens)


def unpacked(tokens: Tensor) -> Tensor:
    latents: Tensor = QwenImagePipeline._unpack_latents(tokens, 2 * SIZE, 2 * SIZE, 2)
    return latents[:, :, 0]


def adapters_and_checkpointing(frozen: TextDenoiser, condition: TextCondition) -> None:
    """Asserts that both work through the call of a network whose `forward` the adapter replaces.

    Args:
        condition: two captions of different lengths.
    """
    frozen.requires_grad_(False)
    adapted: Any = lora_copy(frozen, 2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    t = torch.tensor([0.9, 0.4])
    x_t = torch.randn(2, *frozen.sample_shape, generator=torch.Generator().manual_seed(3))
    calls: list[Any] = []
    adapted.network.register_forward_pre_hook(lambda module, given: calls.append(module))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(adapted)
        x0 = adapted(x_t, t, condition)
        found.append((x0, *torch.autograd.grad(x0.square().sum(), trained)))
    assert len(calls) == 2
    assert all(call is adapted.network for call in calls)
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0][0], frozen(x_t, t, condition), atol=1e-2)
    expected = own_output(copy.deepcopy(adapted).network, x_t, t, condition)
    torch.testing.assert_close(adapted.predict(x_t, t, condition)[0].output, expected, rtol=1e-5, atol=1e-5)

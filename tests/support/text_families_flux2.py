"""Tiny pipelines of FLUX.2, from configs: klein with Qwen 3, and dev with Mistral Small 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from einops import rearrange
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fdistill.adapters.tiny_parts import RESOLUTION, untrained
from fdistill.commands.tiny_pipelines import tiny_pipeline

#: From diffusers 0.37 on both pipelines are there.
HAS_FLUX2 = hasattr(diffusers, "Flux2KleinPipeline")
if HAS_FLUX2:
    from diffusers import Flux2KleinPipeline, Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    from fdistill.adapters.flux2 import tiny_autoencoder, tiny_transformer

_WIDTH = 8  # of the language model
_SPECIALS = ["<s>", "</s>", "<pad>", "[IMG]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
_SPECIALS += ["[IMG_BREAK]", "[IMG_END]"]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
)


def klein(folder: Path) -> Path:
    """klein: true guidance, and a language model that is told not to think."""
    tiny_pipeline("Flux2KleinPipeline").save_pretrained(folder)
    return folder


def mistral_processor() -> Any:
    """Bytes and a few words; every text begins with <s>, and padding is on the left."""
    from tokenizers import processors

    merges = [(word[:i], word[i]) for word in ("Ġbold", "Ġthin", "Ġseven") for i in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    tokens = [*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped: Any = PreTrainedTokenizerFast
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(),
        tokenizer=wrapped(tokenizer_object=tokenizer, **names),
        chat_template=_TEMPLATE,
    )


def mistral_encoder(tokenizer: Any) -> Any:
    """A language model with the 31 layers that dev's pipeline needs."""
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 31,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.3,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=3, initializer_range=0.3)
    return untrained(lambda: Mistral3ForConditionalGeneration(config))


def dev(folder: Path) -> Path:
    """dev: told a guidance scale, and a language model that is told what it is for."""
    processor = mistral_processor()
    Flux2Pipeline(
        vae=tiny_autoencoder(),
        text_encoder=mistral_encoder(processor.tokenizer),
        tokenizer=processor,
        transformer=tiny_transformer(guidance_embeds=True, joint_attention_dim=3 * _WIDTH),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return folder


def own_flux2_output(network: Any, x_t: Tensor, t: Tensor, embeds: Tensor, guidance: float = 4.0) -> Tensor:
    """What the transformer says when it is called as its pipelines call it, [B, C, H, W]."""
    places = Flux2KleinPipeline._prepare_latent_ids(x_t)
    tokens = network(
        hidden_states=Flux2KleinPipeline._pack_latents(x_t),
        timestep=t,
        guidance=torch.full_like(t, guidance) if network.config.guidance_embeds else None,
        encoder_hidden_states=embeds,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds),
        img_ids=places,
        return_dict=False,
    )[0]
    latents: Tensor = Flux2KleinPipeline._unpack_latents_with_ids(tokens, places)
    return latents


@torch.no_grad()
def network_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """What the network sees of what a pipeline returns for output_type="latent": patches of 2 x 2, normalised.

    klein returns latents as its autoencoder decodes them, and dev the network's tokens, of images `RESOLUTION` high.
    """
    if latents.ndim == 3:
        return rearrange(latents, "b (h w) c -> b c h w", h=RESOLUTION // 2)
    patches = Flux2KleinPipeline._patchify_latents(latents)
    norm = pipeline.vae.bn
    found: Tensor = torch.nn.functional.batch_norm(patches, norm.running_mean, norm.running_var, eps=norm.eps)
    return found


_CALL = {"num_inference_steps": 1, "height": RESOLUTION, "width": RESOLUTION}
#: Name -> (what writes the pipeline, its class, what a one-step student of it is called with).
TEXT_FAMILIES_FLUX2: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {}
if HAS_FLUX2:
    TEXT_FAMILIES_FLUX2 = {
        "flux2-klein": (klein, "Flux2KleinPipeline", {**_CALL, "guidance_scale": 1.0}),
        "flux2-dev": (dev, "Flux2Pipeline", {**_CALL, "guidance_scale": 4.0}),
    }

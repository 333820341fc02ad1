"""Tiny pipelines of transformers with one large text encoder: PixArt, Sana, Qwen-Image, Z-Image and FLUX.2."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from fdistill.adapters.pixart import tiny_transformer as pixart_transformer
from fdistill.adapters.tiny_parts import RESOLUTION
from fdistill.commands.tiny_pipelines import tiny_pipeline
from support.families import randomised
from support.text_families_flux2 import TEXT_FAMILIES_FLUX2

__all__ = [
    "HAS_QWEN_IMAGE",
    "HAS_Z_IMAGE",
    "SANA_RESOLUTION",
    "TEXT_FAMILIES_DIT",
    "pixart_transformer",
    "qwen_transformer",
    "sana_transformer",
]

#: From diffusers 0.37 on Qwen-Image does not see the padding of prompts, and is supported.
HAS_QWEN_IMAGE = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) >= (0, 37)
if HAS_QWEN_IMAGE:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

HAS_Z_IMAGE = hasattr(diffusers, "ZImagePipeline")

#: SanaPipeline takes multiples of 32.
SANA_RESOLUTION = 32
#: What QwenImagePipeline puts around a prompt; it drops the first 34 tokens.
QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_WORDS = "a bold thin handwritten digit zero one two three four five six seven eight nine"


def _byte_pairs(texts: Sequence[str], specials: Sequence[str], first: str | None = None, **names: str) -> Any:
    """Byte pairs trained until every word of the texts is one token; `first` stands before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            special_tokens=list(specials), initial_alphabet=sorted(alphabet), vocab_size=4000, show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_object=tokenizer, **names)


def sana_instruction() -> list[str]:
    """What SanaPipeline puts before a prompt."""
    instruction: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return instruction


def gemma_tokenizer() -> Any:
    texts = [*sana_instruction(), _WORDS]
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return _byte_pairs(texts, list(names.values()), "<bos>", **names)


def qwen_tokenizer() -> Any:
    texts = [QWEN_TEMPLATE, QWEN_TEMPLATE, _WORDS]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_pairs(texts, specials, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="right")


def gemma_encoder(tokenizer: Any, width: int) -> Any:
    torch.manual_seed(width)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.3,
    )
    return randomised(Gemma2Model(config)).eval()


def qwen_encoder(tokenizer: Any, width: int) -> Any:
    torch.manual_seed(width)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2], "rope_type": "default"},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "initializer_range": 0.3,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": width,
            "patch_size": 2,
            "fullatt_block_indexes": [0],
        },
        image_token_id=0,
        video_token_id=0,
        vision_start_token_id=0,
        vision_end_token_id=0,
    )
    return randomised(Qwen2_5_VLForConditionalGeneration(config)).eval()


def pixart(folder: Path) -> Path:
    """PixArt-Sigma: eps with learned variances, linear betas, captions of 300 tokens."""
    tiny_pipeline("PixArtSigmaPipeline").save_pretrained(folder)
    return folder


def pixart_alpha(folder: Path) -> Path:
    """PixArt-alpha for 1024 pixels: told the resolution and the aspect ratio, captions of 120 tokens.

    Its sample size of 128 is what PixArtAlphaPipeline knows it by; it draws 16 x 16 pixels if it is asked for them.
    """
    tiny_pipeline("PixArtAlphaPipeline", {"sample_size": 128}).save_pretrained(folder)
    return folder


def sana_transformer(**changes: Any) -> SanaTransformer2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
        "sample_size": 8,
        "patch_size": 1,
    }
    transformer: SanaTransformer2DModel = randomised(SanaTransformer2DModel(**(settings | changes)).eval())
    return transformer


def deep_compression_vae() -> AutoencoderDC:
    """4 pixels a latent, 8 channels, no posterior."""
    torch.manual_seed(4)
    blocks: dict[str, Any] = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 16),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (5,)),
        }.items()
    }
    return AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.41, **blocks).eval()


def sana(folder: Path, **changes: Any) -> Path:
    """Sana: flow with a solver of shifted levels, a language model told how to enhance prompts."""
    tokenizer = gemma_tokenizer()
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(tokenizer, 24),
        vae=deep_compression_vae(),
        transformer=sana_transformer(**changes),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    ).save_pretrained(folder)
    return folder


def sana_timestep_scale(folder: Path) -> Path:
    """Sana that is told timesteps in [0, 1], as those of its later versions are."""
    return sana(folder, timestep_scale=0.001, qk_norm="rms_norm_across_heads")


def qwen_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    transformer: QwenImageTransformer2DModel = randomised(QwenImageTransformer2DModel(**(settings | changes)).eval())
    return transformer


def video_vae() -> AutoencoderKLQwenImage:
    """2 pixels a latent, 4 channels, each with its own mean and standard deviation."""
    torch.manual_seed(5)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[2.8, 1.4, 2.1, 1.7],
    ).eval()


def qwen_image(folder: Path) -> Path:
    """Qwen-Image: flow on packed latents, prompts of their own length each."""
    tokenizer = qwen_tokenizer()
    QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=qwen_encoder(tokenizer, 24),
        vae=video_vae(),
        transformer=qwen_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    ).save_pretrained(folder)
    return folder


def z_image(folder: Path) -> Path:
    """Z-Image: flow whose time runs the other way, prompts of their own length each."""
    tiny_pipeline("ZImagePipeline").save_pretrained(folder)
    return folder


def _call(resolution: int, **more: Any) -> dict[str, Any]:
    return {"num_inference_steps": 1, "height": resolution, "width": resolution, **more}


#: The pipelines of PixArt and Sana know some resolutions of their own, to which they would round.
_UNGUIDED: dict[str, Any] = {"guidance_scale": 0.0, "use_resolution_binning": False}

#: Name -> (what writes the pipeline, its class, what a one-step student of it is called with).
TEXT_FAMILIES_DIT: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "pixart": (pixart, "PixArtSigmaPipeline", _call(RESOLUTION, **_UNGUIDED)),
    "pixart-alpha": (pixart_alpha, "PixArtAlphaPipeline", _call(RESOLUTION, **_UNGUIDED)),
    "sana": (sana, "SanaPipeline", _call(SANA_RESOLUTION, **_UNGUIDED)),
    "sana-timestep-scale": (sana_timestep_scale, "SanaPipeline", _call(SANA_RESOLUTION, **_UNGUIDED)),
}
if HAS_QWEN_IMAGE:
    TEXT_FAMILIES_DIT["qwen-image"] = (qwen_image, "QwenImagePipeline", _call(RESOLUTION, true_cfg_scale=1.0))
if HAS_Z_IMAGE:
    TEXT_FAMILIES_DIT["z-image"] = (z_image, "ZImagePipeline", _call(RESOLUTION, guidance_scale=0.0))
TEXT_FAMILIES_DIT |= TEXT_FAMILIES_FLUX2

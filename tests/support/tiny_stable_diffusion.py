"""Untrained Stable Diffusion 1, 2 and XL of a few thousand parameters, from real components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "seven</w>", "three</w>", "bold</w>", "thin</w>"]


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    settings: dict[str, object] = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**(settings | changes)).eval()


SD2 = {"use_linear_projection": True, "cross_attention_dim": 24}
XL = {
    "use_linear_projection": True,
    "cross_attention_dim": 40,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "one-layer": {"layers_per_block": 1},
    "sd2": SD2,
    "xl": XL,
}


def tiny_vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        scaling_factor=scaling_factor,
    ).eval()


def tiny_text_encoder(width: int, *, projection: bool = False, act: str = "quick_gelu") -> Any:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=8,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def tiny_pipeline(kind: str, folder: Path, **scheduler: object) -> Path:
    """An untrained Stable Diffusion 1, 2 or XL as a pipeline folder."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    parts: dict[str, Any] = {
        "unet": tiny_unet(**UNETS[kind]),
        "vae": tiny_vae(0.13025 if kind == "xl" else 0.18215),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **scheduler),
        "tokenizer": tokenizer,
        "text_encoder": tiny_text_encoder(24 if kind == "sd2" else 16, act="gelu" if kind == "sd2" else "quick_gelu"),
    }
    if kind == "xl":
        second = tiny_text_encoder(24, projection=True, act="gelu")
        pipeline: DiffusionPipeline = StableDiffusionXLPipeline(
            **parts, tokenizer_2=tokenizer, text_encoder_2=second, add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder


def adapted_unet(folder: Path, alpha: float = 3.0) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    targets = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "conv_shortcut", "time_emb_proj"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=targets), "student")
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return unet.eval()


def unet_output(unet: UNet2DConditionModel) -> Tensor:
    torch.manual_seed(2)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.randn(2, 5, unet.config.cross_attention_dim)
    extra = None
    if unet.config.addition_embed_type:
        extra = {"text_embeds": torch.randn(2, 24), "time_ids": torch.zeros(2, 6)}
    with torch.no_grad():
        return unet(*inputs, added_cond_kwargs=extra).sample


def sd3_base(folder: Path) -> tuple[Path, SD3Transformer2DModel]:
    """The parts of a Stable Diffusion 3 pipeline that a checkpoint replaces, and the scheduler."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    network.save_pretrained(folder / "transformer")
    tiny_vae().save_pretrained(folder / "vae")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder, network

"""Kinds of UNet2DModel and UNet2DConditionModel."""

from __future__ import annotations

from typing import Any

ARCHITECTURES: dict[str, dict[str, object]] = {
    "plain": {},
    "no-middle": {"mid_block_type": None},
    "fourier": {"time_embedding_type": "fourier"},
    "centred-unconditional": {"center_input_sample": True, "num_class_embeds": None},
    "consistency-model": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "skip": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 64),
        "in_channels": 3,
        "out_channels": 3,
    },
}

#: Stable Diffusion XL.
XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
#: diffusers' UNet2DConditionModel with and without what the models of Stable Diffusion have.
CONDITION_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"use_linear_projection": True, "attention_head_dim": (1, 2)},
    "sdxl": XL,
    "no-middle": {"mid_block_type": None},
    "odd-size": {"sample_size": 7},
    "projected-text": {"encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"},
    "activated-time": {"time_embedding_act_fn": "silu", "center_input_sample": True},
}

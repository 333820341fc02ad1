"""Kinds of UNet2DModel."""

from __future__ import annotations

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

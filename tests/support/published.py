"""The published networks of the recipes' teachers, on the meta device: their sizes, without weights or downloads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from fdistill import load_config
from fdistill.adapters import wrap
from fdistill.denoiser import Denoiser
from fdistill.networks import EDM2Network, EDMNetwork

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import memory_table

DDPMPP: dict[str, Any] = {"model_type": "SongUNet", "img_resolution": 32, "augment_dim": 9, "channel_mult": [2, 2, 2]}
LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
DIT: dict[str, Any] = {"num_layers": 28, "num_embeds_ada_norm": 1000, "out_channels": 4, "sample_size": 32}
ATTENTION_AT_16: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
#: Recipe -> the network of its teacher, and the config of the scheduler beside it.
PIXEL_AND_LATENT: dict[str, tuple[Callable[[], Any], dict[str, Any] | None]] = {
    "cifar10-cond": (lambda: EDMNetwork(**DDPMPP, label_dim=10), None),
    "cifar10-uncond": (lambda: EDMNetwork(**DDPMPP), None),
    "imagenet64": (lambda: EDMNetwork("DhariwalUNet", 64, label_dim=1000), None),
    "imagenet512": (lambda: EDM2Network(64, 4, label_dim=1000), None),
    "imagenet256": (
        lambda: DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, in_channels=4, **DIT),
        {**LINEAR, "guidance_channels": 3},  # which `fdistill convert --family dit` notes
    ),
    "ddpm-cifar10": (
        lambda: UNet2DModel(32, 3, 3, block_out_channels=(128, 256, 256, 256), layers_per_block=2, **ATTENTION_AT_16),
        LINEAR,
    ),
}


def published_network(recipe: str) -> Denoiser:
    """The teacher of a recipe, or of the one that a LoRA recipe is made from."""
    name = recipe.removesuffix("-lora-24gb")
    if name in PIXEL_AND_LATENT:
        build, scheduler = PIXEL_AND_LATENT[name]
        with torch.device("meta"):
            network = build()
        return wrap(network, scheduler)
    if name != "sd21-v":
        return memory_table.published(name, load_config(recipe).resolution)
    with torch.device("meta"):
        unet = UNet2DConditionModel(96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20))
    return wrap(unet, {**SCALED, "prediction_type": "v_prediction"})

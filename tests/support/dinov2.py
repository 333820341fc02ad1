"""A tiny DINOv2."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def published_dinov2(width: int = 128, depth: int = 2, side: int = 37) -> dict[str, Tensor]:
    """Seeded random weights under the names, and in the shapes, of the published state dicts."""
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=14 * side, patch_size=14, embed_dim=width, depth=depth, num_heads=2, init_values=1.0, num_classes=0
    )
    state = {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}
    return state | {"mask_token": torch.zeros(1, width)}

"""DINOv2 (arXiv 2304.07193), for Frechet distances (arXiv 2306.04675) with EDM2's preprocessing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.extractors.extractor import Extractor, runner
from evaluation.weights import PUBLISHED, Weights, find_weights, is_published
from fdistill.base.errors import CheckpointError, brief
from fdistill.base.files import sha256_of_files
from fdistill.base.torch_files import read_state_dict

_SIZE, _PATCH, _HEAD = 224, 14, 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_dinov2(device: torch.device, weights: Weights) -> Extractor:
    """The class token after the last norm: "cls" [B, 1024] of the published ViT-L/14."""
    file = PUBLISHED["dinov2"]
    path = find_weights("dinov2", file, weights)
    try:
        network, width = dinov2_network(read_state_dict(path))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: is no DINOv2 ({brief(error)}); expected {file.name} from {file.url}") from error
    network.to(device)

    def compute(images: Tensor) -> dict[str, Tensor]:
        return {"cls": network(prepare(images.to(device)))}

    sha256 = sha256_of_files([path])
    preparation = "torch bicubic with antialiasing to 224x224 in float32, x / 255, ImageNet mean and deviation"
    run = runner(compute, device)
    return Extractor("dinov2", {"cls": width}, run, preparation, sha256, is_published(path, sha256, file))


def prepare(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 224, 224]. Values that the bicubic filter overshoots are not clipped."""
    x = F.interpolate(images.float(), (_SIZE, _SIZE), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(values, device=x.device).reshape(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (x - mean) / std


def dinov2_network(state: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """(network, number of features) of a published state dict (S, B or L, without registers), for 224x224 images.

    Raises:
        KeyError, RuntimeError: tensors are missing or are of another network.
    """
    from timm.models.vision_transformer import VisionTransformer

    position = state["pos_embed"]
    width = position.shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    state = {name: value.float() for name, value in state.items() if name != "mask_token"}
    state["pos_embed"] = position_embedding(position.float(), _SIZE // _PATCH)
    with torch.device("meta"):
        network = VisionTransformer(
            img_size=_SIZE,
            patch_size=_PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=width // _HEAD,
            init_values=1.0,
            num_classes=0,
            weight_init="skip",
        )
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False), width


def position_embedding(published: Tensor, size: int) -> Tensor:
    """[1, 1 + M^2, D] -> [1, 1 + size^2, D], bicubic without antialiasing.

    As in the published code the scale is (size + 0.1) / M, and not size / M.
    """
    token, patches = published[:, :1], published[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (size + 0.1) / side
    resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)

"""LPIPS with weights of the test's own."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

from evaluation.weights import PUBLISHED

WIDTHS = (64, 128, 256, 512, 512)


def vgg_layers() -> nn.Module:
    """torchvision's own VGG16 layers with seeded random weights; its classifier of 120 million is left out."""
    torch.manual_seed(0)
    layers: nn.Module = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    return layers


def write_lpips(folder: Path) -> Path:
    """Writes both weights files under their published names into the folder, and returns it."""
    vgg_state = {f"features.{name}": value for name, value in vgg_layers().state_dict().items()}
    torch.save(vgg_state | {"classifier.6.bias": torch.zeros(1000)}, folder / PUBLISHED["vgg16"].name)
    torch.manual_seed(1)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
    torch.save(linear, folder / PUBLISHED["lpips"].name)
    return folder

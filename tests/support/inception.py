"""Inception with weights of the test's own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation.weights import PUBLISHED


def write_inception(folder: Path) -> Path:
    """Seeded random weights in every tensor of torch-fidelity's Inception, as its own .pth has them; normalisations fit
    some images, without which the features of all images would be the same.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("n", ["2048"], feature_extractor_weights_path=empty).train()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_(0, 0.1)
    network(torch.cat([images(2, 16, seed=1), images(2, 64, seed=2)[:, :, ::4, ::4] // 2]))
    state = network.state_dict()
    path = folder / PUBLISHED["inception"].name
    torch.save(state, path)
    return path


def images(count: int, height: int, width: int | None = None, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width or height), dtype=torch.uint8, generator=random)

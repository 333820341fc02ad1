"""The network of digits itself: its features and classes score generated digits without any download."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fdistill.assets import DIGITS_FEATURES
from fdistill.base.files import sha256_of_files
from fdistill.base.images import to_unit

FEATURE_DIM = 64


class DigitFeatures(nn.Module):
    """8x8 greyscale digits -> 64 features -> 10 classes; 108 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.BatchNorm2d(48),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURE_DIM),
            nn.SiLU(),
        )
        self.classifier = nn.Linear(FEATURE_DIM, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 1, 8, 8] in [-1, 1] -> (features [B, 64], class logits [B, 10])."""
        features = self.body(x)
        return features, self.classifier(features)


def load_digit_features() -> DigitFeatures:
    """The trained network that comes with the package, in eval mode on the CPU."""
    network = DigitFeatures()
    network.load_state_dict(load_file(DIGITS_FEATURES / "model.safetensors"))
    return network.eval().requires_grad_(False)


def weights_sha256() -> str:
    """SHA-256 of the embedded weights file, in hexadecimal digits, for the provenance of scores."""
    return sha256_of_files([DIGITS_FEATURES / "model.safetensors"])


@torch.no_grad()
def extract(network: DigitFeatures, images: Tensor, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """images uint8 [N, 1, 8, 8] -> (features [N, 64] float64, predicted classes [N] int64)."""
    features, classes = [], []
    for chunk in images.split(batch_size):
        chunk_features, logits = network(to_unit(chunk))
        features.append(chunk_features.double())
        classes.append(logits.argmax(1))
    return torch.cat(features), torch.cat(classes)

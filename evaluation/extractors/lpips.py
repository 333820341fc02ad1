"""LPIPS (arXiv 1801.03924), version 0.1 with VGG16: how different two images look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.extractors.extractor import check_images, full_precision
from evaluation.weights import PUBLISHED, Weights, find_weights, is_published
from fdistill.base.errors import ArgumentError, CheckpointError, brief
from fdistill.base.files import sha256_of_files
from fdistill.base.torch_files import read_state_dict

_BLOCKS: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """The perceptual distance of image pairs, 0 for equal images. Images are not resized.

    Args:
        vgg: tensors of torchvision's VGG16 by their names; those of its classifier are not used and may be absent.
        linear: weights of the channels of five feature maps, "lin0.model.1.weight" [1, C, 1, 1] and so on.
        sha256: hashes of the two weights files, by network.
        published: whether both are the published ones.

    Raises:
        KeyError, RuntimeError: tensors are missing or are of another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        vgg: Mapping[str, Tensor],
        linear: Mapping[str, Tensor],
        sha256: Mapping[str, str] | None = None,
        published: bool = False,
    ):
        super().__init__()
        self.sha256, self.published = dict(sha256 or {}), published
        layers: list[nn.Module] = []
        self._taps: list[int] = []
        channels = 3
        with torch.device("meta"):
            for widths in _BLOCKS:
                layers += [nn.MaxPool2d(2)] if layers else []
                for width in widths:
                    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                    channels = width
                self._taps.append(len(layers) - 1)
            self.features = nn.Sequential(*layers)
        own = {name.removeprefix("features."): value for name, value in vgg.items() if name.startswith("features.")}
        self.features.load_state_dict(own, assign=True)
        for i, widths in enumerate(_BLOCKS):
            weight = linear[f"lin{i}.model.1.weight"]
            if weight.shape != (1, widths[-1], 1, 1):
                raise RuntimeError(f"lin{i}.model.1.weight: got {list(weight.shape)}, expected [1, {widths[-1]}, 1, 1]")
            self.register_buffer(f"linear{i}", weight)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1), persistent=False)
        self.float().eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: uint8 [B, 3, H, W] of at least 16x16, on any device -> float32 [B] on the network's device."""
        check_images(a)
        check_images(b)
        if a.shape != b.shape or min(a.shape[2:]) < 16:
            raise ArgumentError(
                f"images: expected pairs of equal shape, 16x16 or larger, got {list(a.shape)} and {list(b.shape)}"
            )
        device = self.shift.device
        with full_precision(device):
            x = torch.cat([a, b]).to(device).float() / 127.5 - 1
            x = (x - self.shift) / self.scale
            total = torch.zeros(len(a), device=device)
            for i, layer in enumerate(self.features):
                x = layer(x)
                if i in self._taps:
                    total += self._difference(x, self.get_buffer(f"linear{self._taps.index(i)}"))
            return total

    @staticmethod
    def _difference(maps: Tensor, weight: Tensor) -> Tensor:
        """Feature maps [2B, C, h, w] of a and then b -> [B], the mean weighted squared difference of unit vectors."""
        unit = maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10)
        a, b = unit.chunk(2)
        return ((a - b).square() * weight).sum(1).mean((1, 2))


def open_lpips(device: torch.device, weights: Weights) -> LPIPS:
    """Opens LPIPS on a device, with the weights "vgg16" and "lpips".

    Raises:
        CheckpointError: its weights are not found, are unreadable, or are of another network.
    """
    paths: dict[str, Path] = {name: find_weights(name, PUBLISHED[name], weights) for name in ("vgg16", "lpips")}
    hashes = {name: sha256_of_files([path]) for name, path in paths.items()}
    published = all(is_published(path, hashes[name], PUBLISHED[name]) for name, path in paths.items())
    try:
        model = LPIPS(read_state_dict(paths["vgg16"]), read_state_dict(paths["lpips"]), hashes, published)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{paths['vgg16']}, {paths['lpips']}: are not the weights of LPIPS ({brief(error)}); "
            f"expected {PUBLISHED['vgg16'].name} from {PUBLISHED['vgg16'].url} and {PUBLISHED['lpips'].name} from "
            f"{PUBLISHED['lpips'].url}"
        ) from error
    return model.to(device)

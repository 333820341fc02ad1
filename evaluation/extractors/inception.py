"""The Inception network of FID (arXiv 1706.08500): TensorFlow's weights of 2015-12-05 in torch-fidelity's network."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from evaluation.extractors.extractor import Extractor, prepare_each, runner
from evaluation.weights import PUBLISHED, Weights, find_weights, is_published
from fdistill.base.errors import CheckpointError, brief
from fdistill.base.files import sha256_of_files
from fdistill.base.torch_files import read_state_dict

_OUTPUTS = {"pool": 2048, "logits": 1008}
_SIZE = 299


def open_inception(device: torch.device, weights: Weights) -> Extractor:
    """FID's original features: pool [B, 2048], and logits [B, 1008] without bias, of images that are resized as
    TensorFlow 1 does, bilinearly. Equal to torch-fidelity's features bit by bit.
    """
    network, sha256, published = _load(device, weights)

    def compute(images: Tensor) -> dict[str, Tensor]:
        pool, logits = network(images.to(device))
        return {"pool": pool, "logits": logits}

    preparation = "TensorFlow 1 bilinear without antialiasing to 299x299 in float32, (x - 128) / 128"
    return Extractor("inception", _OUTPUTS, runner(compute, device), preparation, sha256, published)


def open_inception_clean(device: torch.device, weights: Weights) -> Extractor:
    """Clean-FID's features (arXiv 2104.11222): the same network, of images that `clean_resize` resizes."""
    network, sha256, published = _load(device, weights)
    parts = dict(network.named_children())
    classifier: Any = parts.pop("fc")
    layers = nn.Sequential(*parts.values())  # in the order in which the network's forward calls them

    def compute(images: Tensor) -> dict[str, Tensor]:
        pool = layers((clean_resize(images).to(device) - 128) / 128).flatten(1)
        return {"pool": pool, "logits": pool @ classifier.weight.T}

    preparation = "PIL bicubic to 299x299, each channel in float32, clipped to [0, 255], not rounded; (x - 128) / 128"
    return Extractor("inception-clean", _OUTPUTS, runner(compute, device), preparation, sha256, published)


def clean_resize(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in [0, 255]: bicubic, antialiased and not rounded."""
    return prepare_each(images, _clean_resize)


def _clean_resize(image: NDArray[Any]) -> Tensor:
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(image, 2, 0)]
    resized = [np.asarray(channel.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized).clip(0, 255))


def _load(device: torch.device, weights: Weights) -> tuple[nn.Module, str, bool]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = PUBLISHED["inception"]
    path = find_weights("inception", file, weights)
    # torch-fidelity unpickles its file without checks, so it gets one that is made here, of tensors alone.
    own = io.BytesIO()
    torch.save(read_state_dict(path), own)
    own.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=own
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: is no Inception of FID ({brief(error)}); expected {file.name} from {file.url}"
        ) from error
    sha256 = sha256_of_files([path])
    return network.to(device), sha256, is_published(path, sha256, file)

"""Models that learnt which images people prefer for a prompt: HPSv2.1 (arXiv 2306.09341) and PickScore (arXiv
2305.01569). Both are CLIP models, ViT-H-14, whose features are compared by their cosine.

Their packages are no longer kept (hpsv2), so that the weights alone are read, by open_clip and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.extractors.clip import ClipModel
from evaluation.extractors.extractor import Extractor, full_precision, prepare_each, runner
from evaluation.weights import PUBLISHED, Weights, find_weights, is_published
from fdistill.base.errors import CheckpointError, brief
from fdistill.base.files import sha256_of_files
from fdistill.base.torch_files import read_state_dict

#: open_clip's name of the architecture of both; OpenAI's mean and standard deviation of pixels.
ARCHITECTURE = "ViT-H-14"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_LENGTH = 77  # tokens of a prompt

#: The sizes of PickScore's network, in transformers' words: those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
PICKSCORE: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
    },
}


def open_hps(name: str, device: torch.device, weights: Weights) -> ClipModel:
    """HPSv2.1 ("hps21"). The features' product is 100 times the cosine, as its benchmark reports it.

    An image is scaled in float so that its longer side fits, and padded with black, which for square images is all.

    Raises:
        CheckpointError: its weights are not found, are unreadable, or are of another architecture.
    """
    import open_clip

    path = find_weights(name, PUBLISHED[name], weights)
    config = open_clip.get_model_config(ARCHITECTURE)
    model: Any = open_clip.CLIP(**config)
    _load(model, read_state_dict(path, within="state_dict"), path)
    size = config["vision_cfg"]["image_size"]
    network = _Network(model, model.encode_image, model.encode_text, size, 100.0)
    preparation = f"bicubic with antialiasing, the longer side to {size}, padded with black; CLIP's mean and deviation"
    return _preference(name, network, path, device, preparation, _padded(size))


def open_pickscore(name: str, device: torch.device, weights: Weights) -> ClipModel:
    """PickScore v1 ("pickscore"). The features' product is exp(logit_scale) times the cosine, about 20 to 23.

    An image is resized as CLIP does it: its shorter side fits, bicubic, and the centre is cut out.

    Raises:
        CheckpointError: as `open_hps`.
    """
    from transformers import CLIPConfig, CLIPModel

    path = find_weights(name, PUBLISHED[name], weights)
    model: Any = CLIPModel(CLIPConfig(**PICKSCORE))
    state = {key: value for key, value in read_state_dict(path).items() if not key.endswith("position_ids")}
    _load(model, state, path)
    size, scale = PICKSCORE["vision_config"]["image_size"], model.logit_scale.exp().item()

    def image(pixels: Tensor) -> Tensor:
        return _features(model.get_image_features(pixel_values=pixels))

    def text(tokens: Tensor) -> Tensor:
        return _features(model.get_text_features(input_ids=tokens))

    preparation = f"Pillow's bicubic, the shorter side to {size}, its centre; CLIP's mean and deviation"
    return _preference(name, _Network(model, image, text, size, scale), path, device, preparation, _cropped(size))


def _features(found: Any) -> Tensor:
    """transformers 5 wraps the features that version 4 returns."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: is of another architecture ({brief(error)}); expected the weights as published, of {ARCHITECTURE}"
        ) from error
    model.float().eval().requires_grad_(False)


@dataclass(frozen=True)
class _Network:
    """Encoders of pixels [B, 3, size, size] and of tokens [B, 77], both to [B, D], and the factor of the cosine."""

    model: nn.Module
    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor]
    size: int
    scale: float


def _preference(
    name: str,
    network: _Network,
    path: Path,
    device: torch.device,
    preparation: str,
    prepare: Callable[[NDArray[Any]], Tensor],
) -> ClipModel:
    """A `ClipModel` whose image features times text features are the score."""
    import open_clip

    network.model.to(device)
    tokenizer = open_clip.SimpleTokenizer(context_length=_LENGTH)

    def compute(images: Tensor) -> dict[str, Tensor]:
        features = network.image(prepare_each(images, prepare).to(device))
        return {"image": network.scale * F.normalize(features, dim=1)}

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str], prefix: str = "") -> Tensor:
        tokens = tokenizer([prefix + prompt for prompt in prompts])
        with full_precision(device):
            features = F.normalize(network.text(tokens.to(device)), dim=1)
        return features.to("cpu", torch.float32)

    sha256 = sha256_of_files([path])
    published = is_published(path, sha256, PUBLISHED[name])
    with torch.no_grad():
        width = network.image(torch.zeros(1, 3, network.size, network.size, device=device)).shape[1]
    extractor = Extractor(name, {"image": width}, runner(compute, device), preparation, sha256, published)
    return ClipModel(extractor, encode_prompts)


def _padded(size: int) -> Callable[[NDArray[Any]], Tensor]:
    """open_clip's "longest" resizing as HPSv2 calls it: on floats, so that nothing is rounded in between."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (_MEAN, _STD))

    def prepare(image: NDArray[Any]) -> Tensor:
        pixels: Tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        scale = size / max(pixels.shape[1:])
        if scale != 1:
            sides = [round(scale * side) for side in pixels.shape[1:]]
            pixels = F.interpolate(pixels[None], sides, mode="bicubic", antialias=True)[0]
            high, wide = (size - side for side in sides)
            pixels = F.pad(pixels, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return (pixels - mean) / std

    return prepare


def _cropped(size: int) -> Callable[[NDArray[Any]], Tensor]:
    """CLIP's own preparation, which PickScore's processor does."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(size=size), is_train=False)

    def prepare(image: NDArray[Any]) -> Tensor:
        prepared: Tensor = transform(Image.fromarray(image))
        return prepared

    return prepare

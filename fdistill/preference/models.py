"""Models that learnt which images people prefer for a prompt: HPSv2.1 (arXiv 2306.09341) and PickScore (arXiv
2305.01569). Both are CLIP models, ViT-H-14, whose features are compared by their cosine.

Their packages are no longer kept (hpsv2), so that the weights alone are read, by open_clip and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdistill.base.errors import CheckpointError, brief
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


class PreferenceModel(nn.Module):
    """A frozen model in float32, whose score of an image is scale times the cosine of the image's and the prompt's
    features.

    Args:
        network: has the weights of both encoders.
        encode_pixels: its image encoder: normalised pixels [B, 3, size, size] -> [B, D].
        encode_tokens: its text encoder: [B, 77] -> [B, D].
        fit: `padded` or `cropped`.
        size: height and width of its inputs.
        scale: the factor of the cosine.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        encode_pixels: Callable[[Tensor], Tensor],
        encode_tokens: Callable[[Tensor], Tensor],
        fit: Callable[[Tensor, int], Tensor],
        size: int,
        scale: float,
    ):
        import open_clip

        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self._encode_pixels, self._encode_tokens, self._fit = encode_pixels, encode_tokens, fit
        self.size, self.scale = size, scale
        self._tokenizer = open_clip.SimpleTokenizer(context_length=_LENGTH)
        for name, value in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(value).reshape(3, 1, 1), persistent=False)

    def encode_fitted(self, images: Tensor) -> Tensor:
        """Features [B, D], of norm `scale`, of RGB images [B, 3, size, size] in [0, 1], differentiable."""
        return self.scale * _normalised(self._encode_pixels((images - self.mean) / self.std))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [B, D] of B prompts. The ends of prompts that have too many tokens are cut off."""
        return _normalised(self._encode_tokens(self._tokenizer(list(prompts)).to(self.mean.device)))

    def score(self, images: Tensor, text: Tensor) -> Tensor:
        """Scores [B] of RGB images [B, 3, H, W] in [0, 1] for prompts with these features [B, D], differentiable in
        the images.
        """
        return (self.encode_fitted(self._fit(images, self.size)) * text).sum(1)


def load_hps(path: Path) -> PreferenceModel:
    """HPSv2.1 on the CPU. A score is 100 times the cosine, as its benchmark reports it.

    Raises:
        CheckpointError: the weights are unreadable, or are of another architecture.
    """
    import open_clip

    config = open_clip.get_model_config(ARCHITECTURE)
    model: Any = open_clip.CLIP(**config)
    _load(model, read_state_dict(path, within="state_dict"), path)
    size = config["vision_cfg"]["image_size"]
    return PreferenceModel(model, model.encode_image, model.encode_text, padded, size, 100.0)


def load_pickscore(path: Path) -> PreferenceModel:
    """PickScore v1 on the CPU. A score is exp(logit_scale) times the cosine, about 20 to 23.

    Raises:
        CheckpointError: as `load_hps`.
    """
    from transformers import CLIPConfig, CLIPModel

    model: Any = CLIPModel(CLIPConfig(**PICKSCORE))
    state = {key: value for key, value in read_state_dict(path).items() if not key.endswith("position_ids")}
    _load(model, state, path)

    def pixels(inputs: Tensor) -> Tensor:
        return _features(model.get_image_features(pixel_values=inputs))

    def tokens(inputs: Tensor) -> Tensor:
        return _features(model.get_text_features(input_ids=inputs))

    size, scale = PICKSCORE["vision_config"]["image_size"], model.logit_scale.exp().item()
    return PreferenceModel(model, pixels, tokens, cropped, size, scale)


class Published(NamedTuple):
    """A model by its name: the function that loads it, and the file of its weights in a Hugging Face repository."""

    load: Callable[[Path], PreferenceModel]
    repository: str
    file: str


MODELS = {
    "hps21": Published(load_hps, "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "pickscore": Published(load_pickscore, "yuvalkirstain/PickScore_v1", "model.safetensors"),
}


def padded(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] -> [B, 3, size, size], differentiable: open_clip's "longest" resizing as HPSv2 calls it, on
    floats, so that nothing is rounded in between. The longer side fits, bicubic with antialiasing; the rest is black.
    """
    scale = size / max(images.shape[2:])
    if scale == 1 and images.shape[2] == images.shape[3]:
        return images
    sides = [round(scale * side) for side in images.shape[2:]]
    images = F.interpolate(images, sides, mode="bicubic", antialias=True)
    high, wide = (size - side for side in sides)
    return F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def cropped(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> [B, 3, size, size] in [0, 1], differentiable: CLIP's own preparation, as
    PickScore's processor does it. The shorter side fits, bicubic with antialiasing; the centre is cut out.

    Pillow rounds the resized image to 8 bits; here nothing is rounded.
    """
    short = min(images.shape[2:])
    if short != size:
        sides = [int(size * side / short) for side in images.shape[2:]]
        images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def _normalised(features: Tensor) -> Tensor:
    """Of norm 1, in float32 at least, whatever autocast made of them."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


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

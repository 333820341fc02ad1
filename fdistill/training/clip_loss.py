"""A hinge on the CLIP similarity of images and their prompts (CLIP: arXiv 2103.00020), by open_clip."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError, did_you_mean
from fdistill.base.reading import not_here
from fdistill.kernels.checks import wide
from fdistill.teachers.autoencoder import LatentSpace, unit_images


class ClipHinge(nn.Module):
    """max(0, margin - cos(image, prompt)): an image that is similar enough to its prompt has no loss.

    Args:
        clip: a model of open_clip, which is frozen here. Its `preprocess_cfg` has the mean and standard deviation of
            its inputs.
        tokenizer: its tokenizer: texts -> [B, L] tokens.
        latents: the autoencoder that decodes samples; None if samples are images.
        margin: the cosine similarity at and above which there is no loss.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, tokenizer: Any, latents: LatentSpace | None = None, *, margin: float = 0.35):
        super().__init__()
        model: Any = clip.eval().requires_grad_(False)
        self.clip = model
        self.tokenizer = tokenizer
        self.margin = margin
        self._latents = latents
        size = model.visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        for name in ("mean", "std"):
            value = torch.tensor(model.visual.preprocess_cfg[name]).reshape(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [B, D] of B prompts. The tokenizer cuts off the ends of prompts that are too long for it."""
        features: Tensor = self.clip.encode_text(self.tokenizer(list(prompts)).to(self.mean.device), normalize=True)
        return features

    def similarity(self, x0: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity [B] of samples [B, C, H, W] with `encode_prompts`'s features [B, D], differentiable in x0.

        Images are clamped to [0, 1] and scaled to CLIP's size (bicubic, antialiased), whatever their shape.
        """
        if len(text) != len(x0):
            raise ArgumentError(f"text: expected features of {len(x0)} prompts, one for each sample, got {len(text)}")
        images = F.interpolate(unit_images(x0, self._latents), self.size, mode="bicubic", antialias=True)
        features = self.clip.encode_image((images - self.mean) / self.std, normalize=True)
        similarity: Tensor = (features * text).sum(1, dtype=wide(features.dtype))
        return similarity

    def forward(self, x0: Tensor, text: Tensor) -> Tensor:
        """[B] losses, in [0, 1 + margin]; arguments as in `similarity`."""
        return F.relu(self.margin - self.similarity(x0, text))


def load_clip(name: str, weights: str | Path) -> tuple[nn.Module, Any]:
    """A CLIP model with weights of a local file, in eval mode, float32, on the CPU, and its tokenizer.

    Args:
        name: an architecture that open_clip knows, such as "ViT-B-32".
        weights: a safetensors file: open_clip's own, as published on the hub (open_clip_model.safetensors).

    Raises:
        ConfigError: open_clip is not installed, or knows no such architecture.
        CheckpointError: no such file, one that is not of safetensors, or of another architecture.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise ConfigError(
            "clip_loss.weight: the CLIP loss needs open_clip, which is not installed; run `pip install "
            "open_clip_torch`, or set clip_loss.weight=0"
        )
    import open_clip

    if name not in open_clip.list_models():
        raise ConfigError(f"clip_loss.model: got {name!r}; {did_you_mean(name, open_clip.list_models())}")
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        problem = not_here(path) if path.suffix == ".safetensors" else "is not a safetensors file"
        raise CheckpointError(
            f"clip_loss.weights {str(weights)!r}: {problem}; download open_clip_model.safetensors of the architecture "
            f"{name} from the hub and pass its path"
        )
    try:
        model = open_clip.create_model(name, pretrained=str(path.resolve()))
        return model.eval(), open_clip.get_tokenizer(name)
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError, SafetensorError) as error:
        raise CheckpointError(
            f"clip_loss.weights {str(weights)!r}: cannot be loaded as {name} ({' '.join(str(error).split())[:300]}); "
            "expected the weights of that architecture; if its tokenizer comes from the hub, download that once as well"
        ) from error

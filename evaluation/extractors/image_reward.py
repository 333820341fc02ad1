"""ImageReward (arXiv 2304.05977): a network that learnt from people which image of a prompt they prefer.

Its text encoder reads the prompt and attends to the patches of the image (BLIP, arXiv 2201.12086), so that image and
prompt have no features of their own to compare. The weights are the published ones; transformers has the networks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from evaluation.extractors.extractor import check_images, full_precision, prepare_each
from evaluation.weights import PUBLISHED, Weights, find_weights
from fdistill.base.errors import CheckpointError, brief
from fdistill.base.torch_files import read_state_dict

#: The weights files: of the networks, and the vocabulary of their prompts.
FILES = ("imagereward", "bert-vocab")
#: Sizes in transformers' words: BLIP's ViT-L/16, and its BERT with cross-attention.
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "is_decoder": True,  # which gives it cross-attention; it is called without a causal mask
}
_HEAD = (1024, 128, 64, 16, 1)
_LENGTH = 35  # tokens of a prompt
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, published with the weights

#: Parts of the published names -> those of this network; the first that matches.
_NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)


class ImageReward(nn.Module):
    """The network, frozen, in float32 and with random weights.

    Args:
        vocabulary: BERT's, a text file with a token a line.
    """

    def __init__(self, vocabulary: Path):
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from tokenizers import BertWordPieceTokenizer
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision: Any = BlipVisionModel(BlipVisionConfig(**VISION))
        self.text: Any = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
        widths = (TEXT["hidden_size"], *_HEAD)
        linear = [nn.Linear(before, after) for before, after in pairwise(widths)]
        # No activations. The published head has dropouts after its first three layers, which names count.
        self.head = nn.Sequential(*(module for layer in linear[:3] for module in (layer, nn.Identity())), *linear[3:])
        self._transform: Any = image_transform_v2(PreprocessCfg(size=VISION["image_size"]), is_train=False)
        self._tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
        self._tokenizer.enable_truncation(_LENGTH)
        self._tokenizer.enable_padding(length=_LENGTH)
        self.float().eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 [B, 3, H, W] on the CPU and B prompts -> rewards, float32 [B] on the CPU, of mean 0 and deviation 1
        over its authors' images.

        The shorter side is resized to 224 (Pillow's bicubic), and the centre cut out. Prompts end after 33 tokens.
        """
        check_images(images)
        device = next(self.parameters()).device
        encodings = self._tokenizer.encode_batch(list(prompts))
        tokens, mask = (
            torch.tensor([getattr(each, name) for each in encodings], device=device)
            for name in ("ids", "attention_mask")
        )
        with full_precision(device):
            patches = self.vision(prepare_each(images, self._prepare).to(device)).last_hidden_state
            read = self.text(tokens, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
            rewards: Tensor = (self.head(read[:, 0])[:, 0] - _MEAN) / _STD
        return rewards.cpu()

    def _prepare(self, image: NDArray[Any]) -> Tensor:
        prepared: Tensor = self._transform(Image.fromarray(image))
        return prepared


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the score is computed from, under this network's names.

    The published file also has projections of BLIP's training, and numbers of positions.
    """
    found = {}
    for name, value in state.items():
        own = next((re.sub(pattern, to, name) for pattern, to in _NAMES if re.search(pattern, name)), None)
        if own is not None and not own.endswith("position_ids"):
            found[own] = value
    return found


def open_image_reward(device: torch.device, weights: Weights) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Opens an `ImageReward` on a device.

    Raises:
        CheckpointError: its weights or its vocabulary are not found, are unreadable, or are of another network.
    """
    path, vocabulary = (find_weights(name, PUBLISHED[name], weights) for name in FILES)
    try:
        network = ImageReward(vocabulary)
    except Exception as error:  # tokenizers raises plain exceptions on what is no vocabulary
        raise CheckpointError(
            f"{vocabulary}: is no vocabulary ({brief(error)}); expected {PUBLISHED['bert-vocab'].name} from "
            f"{PUBLISHED['bert-vocab'].url}"
        ) from error
    try:
        network.load_state_dict(renamed(read_state_dict(path)))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: are not ImageReward's weights ({brief(error)}); expected {PUBLISHED['imagereward'].name} from "
            f"{PUBLISHED['imagereward'].url}"
        ) from error
    return network.to(device)

"""A tiny ImageReward with random weights, under the names of the published file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.extractors import image_reward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "bold", "seven", "##s", "moon", ","]
HEADS, WIDTH, READER, VOCABULARY, SIZE = 2, 16, 24, 20, 32
VISION: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": SIZE}
TEXT: dict[str, Any] = {"hidden_size": READER, "encoder_hidden_size": WIDTH, "intermediate_size": 40}


def published(random: torch.Generator) -> dict[str, Tensor]:
    """Tensors under the published names, with others beside them that the score does not read."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, before: int, after: int) -> None:
        shapes.update({f"{name}.weight": (after, before), f"{name}.bias": (after,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    see, read = "blip.visual_encoder.", "blip.text_encoder."
    shapes |= {f"{see}cls_token": (1, 1, WIDTH), f"{see}pos_embed": (1, 5, WIDTH)}
    shapes |= {f"{see}patch_embed.proj.weight": (WIDTH, 3, 16, 16), f"{see}patch_embed.proj.bias": (WIDTH,)}
    for number in range(2):
        block = f"{see}blocks.{number}."
        norm(f"{block}norm1", WIDTH)
        norm(f"{block}norm2", WIDTH)
        linear(f"{block}attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}attn.proj", WIDTH, WIDTH)
        linear(f"{block}mlp.fc1", WIDTH, 32)
        linear(f"{block}mlp.fc2", 32, WIDTH)
    norm(f"{see}norm", WIDTH)
    shapes |= {f"{read}embeddings.word_embeddings.weight": (VOCABULARY, READER)}
    shapes |= {f"{read}embeddings.position_embeddings.weight": (64, READER)}
    norm(f"{read}embeddings.LayerNorm", READER)
    for number in range(2):
        layer = f"{read}encoder.layer.{number}."
        for part, source in (("attention", READER), ("crossattention", WIDTH)):
            linear(f"{layer}{part}.self.query", READER, READER)
            linear(f"{layer}{part}.self.key", source, READER)
            linear(f"{layer}{part}.self.value", source, READER)
            linear(f"{layer}{part}.output.dense", READER, READER)
            norm(f"{layer}{part}.output.LayerNorm", READER)
        linear(f"{layer}intermediate.dense", READER, 40)
        linear(f"{layer}output.dense", 40, READER)
        norm(f"{layer}output.LayerNorm", READER)
    for number, before, after in ((0, READER, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{number}", before, after)
    linear("blip.vision_proj", WIDTH, 8)
    linear("blip.text_proj", READER, 8)
    state = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return {**state, f"{read}embeddings.position_ids": torch.arange(64)[None]}


def tiny_image_reward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Its weights and its vocabulary, as `weights` of `evaluate`."""
    few = {"num_attention_heads": HEADS, "num_hidden_layers": 2}
    text = {**TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 2, "sep_token_id": 3}
    monkeypatch.setattr(image_reward, "VISION", image_reward.VISION | VISION | few)
    monkeypatch.setattr(image_reward, "TEXT", image_reward.TEXT | text | few)
    torch.save(published(torch.Generator().manual_seed(0)), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {"imagereward": folder / "ImageReward.pt", "bert-vocab": folder / "vocab.txt"}

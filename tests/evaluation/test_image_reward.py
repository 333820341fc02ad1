"""ImageReward against BLIP's modules written out here under the names of the published file, tiny and random."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from evaluation.evaluate import evaluate
from evaluation.extractors import image_reward
from evaluation.extractors.image_reward import open_image_reward
from fdistill.base.errors import CheckpointError
from support.image_reward import HEADS, SIZE, tiny_image_reward
from support.preference import pictures

CPU = torch.device("cpu")
PROMPTS = ["A bold seven", "cats, " * 30 + "moon"]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (query, key, value))
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def reward(state: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """BLIP's ViT (norms before), and BERT with cross-attention (norms after), in float64; then the linear head."""
    w = {name: value.double() for name, value in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    see, read = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels.double(), w[f"{see}patch_embed.proj.weight"], w[f"{see}patch_embed.proj.bias"], stride=16)
    x = torch.cat([w[f"{see}cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w[f"{see}pos_embed"]
    for number in range(2):
        block = f"{see}blocks.{number}."
        q, k, v = linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}attn.proj", attention(q, k, v))
        x = x + linear(f"{block}mlp.fc2", F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6))))
    seen = norm(f"{see}norm", x, 1e-6)
    places = w[f"{read}embeddings.position_embeddings.weight"][: tokens.shape[1]]
    h = norm(f"{read}embeddings.LayerNorm", w[f"{read}embeddings.word_embeddings.weight"][tokens] + places, 1e-12)
    for number in range(2):
        layer = f"{read}encoder.layer.{number}."
        for part, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            of = h if source is None else source
            own = f"{layer}{part}.self."
            mixed = attention(linear(f"{own}query", h), linear(f"{own}key", of), linear(f"{own}value", of), hidden)
            h = norm(f"{layer}{part}.output.LayerNorm", h + linear(f"{layer}{part}.output.dense", mixed), 1e-12)
        wide = F.gelu(linear(f"{layer}intermediate.dense", h))
        h = norm(f"{layer}output.LayerNorm", h + linear(f"{layer}output.dense", wide), 1e-12)
    r = h[:, 0]
    for number in (0, 2, 4, 6, 7):
        r = linear(f"mlp.layers.{number}", r)
    return (r[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    return tiny_image_reward(tmp_path, monkeypatch)


def expected(weights: dict[str, Path], images: Tensor) -> Tensor:
    """On pixels that Pillow has resized. The first prompt is filled, the second is cut and keeps its end."""
    transform = open_clip.image_transform(SIZE, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(each.permute(1, 2, 0).numpy())) for each in images])
    tokens = torch.tensor([[2, 5, 7, 8, 3] + 30 * [0], [2, *(11 * [6, 9, 11]), 3]])
    return reward(torch.load(weights["imagereward"]), pixels, tokens, (tokens != 0).long())


@pytest.mark.parametrize("shape", [(32, 32), (48, 80)])
def test_the_reward_is_blips_forward_pass(shape: tuple[int, int], weights: dict[str, Path]) -> None:
    images = pictures(*shape)
    wanted = expected(weights, images)
    found = open_image_reward(CPU, weights)(images, PROMPTS)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    assert wanted.std() > 0.1


def test_the_protocol_scores_a_folder(weights: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    images = pictures(32, 32)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options: dict[str, Any] = {"metrics": ["imagereward"], "weights": weights, "device": "cpu"}
    result = evaluate(folder, protocol="few-step-t2i", prompts=tmp_path / "prompts.txt", **options)
    ((key, value),) = result["metrics"].items()
    assert key.startswith("imagereward@2 (other weights ")
    assert value == pytest.approx(expected(weights, images).mean().item(), abs=1e-3)


def test_the_sizes_are_those_of_blip_large() -> None:
    """24 layers of 1024 and 12 layers of 768 with cross-attention, as ViT-L/16 and BERT base are known to have."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**image_reward.VISION))
        text = BlipTextModel(BlipTextConfig(**image_reward.TEXT), add_pooling_layer=False)
    assert sum(parameter.numel() for parameter in vision.parameters()) == 303_301_632  # ViT-L/16 without its classifier
    cross = 12 * (2 * (768 * 768 + 768) + 2 * (1024 * 768 + 768) + 2 * 768)
    bert = 108_891_648 + 2 * 768 - 2 * 768  # BERT base without its pooler; two tokens more, and no types of tokens
    assert sum(parameter.numel() for parameter in text.parameters()) == bert + cross


def test_other_files_are_refused(weights: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(weights["imagereward"])
    for name in ("blip.visual_encoder.blocks.1.attn.qkv.bias", "mlp.layers.7.weight"):
        torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "less.pt")
        with pytest.raises(
            CheckpointError, match=r"are not ImageReward's weights .*expected ImageReward/ImageReward.pt"
        ):
            open_image_reward(CPU, {**weights, "imagereward": tmp_path / "less.pt"})
    with pytest.raises(CheckpointError, match=r"is no vocabulary .*expected bert-base-uncased/vocab.txt"):
        open_image_reward(CPU, {**weights, "bert-vocab": weights["imagereward"]})

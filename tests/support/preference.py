"""Tiny preference models with random weights, of the classes of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fdistill.preference import models
from support.clip import CONFIG

SIDES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY: dict[str, Any] = {
    "projection_dim": 16,
    "text_config": {**SIDES, "hidden_act": "gelu", "projection_dim": 16, "eos_token_id": 49407},
    "vision_config": {**SIDES, "hidden_act": "gelu", "patch_size": 8, "image_size": 32, "projection_dim": 16},
}


def tiny_hps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """Weights as published: tensors under a key, with other things beside them; and the model."""
    (folder / "tiny-hps.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "tiny-hps.json")
    monkeypatch.setattr(models, "ARCHITECTURE", "tiny-hps")
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "name": "hps", "state_dict": model.state_dict()}, path)
    return path, model


def tiny_pickscore(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """Weights as published, and the model."""
    monkeypatch.setattr(models, "PICKSCORE", TINY)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**TINY)).eval()
    model.logit_scale.data.fill_(4.4)
    path = folder / "model.safetensors"
    state = {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(77)[None]}  # of older versions
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path, model


def pictures(height: int, width: int) -> Tensor:
    """Two smooth images uint8 [2, 3, height, width]."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (2, height // 4, width // 4, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC)) for each in small]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).contiguous()

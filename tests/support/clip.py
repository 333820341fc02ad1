"""A tiny CLIP model of open_clip."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def tiny_clip_file(folder: Path) -> Path:
    """Weights of the architecture "tiny-fdistill", which open_clip knows from here on."""
    (folder / "tiny-fdistill.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "tiny-fdistill.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-fdistill")
    path = folder / "tiny.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path

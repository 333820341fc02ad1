"""Folders of tiny pipelines with adapters, as those of students have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.formats.lora_file import LORA_FILE, save_lora
from fdistill.students.lora import STUDENT, lora_copy
from support.text_pipelines import denoiser_of, family_of


def adapted(pipeline: Any, folder: Path) -> TextDenoiser:
    """A copy of a pipeline's denoiser with adapters of scale 1.5 on all its layers, which are written to the folder."""
    frozen = denoiser_of(pipeline).requires_grad_(False)
    copied = lora_copy(frozen, 2, adapter=STUDENT, alpha=3.0)
    assert isinstance(copied, TextDenoiser)
    torch.manual_seed(1)
    for name, parameter in copied.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_lora(copied.network, folder / LORA_FILE, family_of(pipeline)[0].component)
    return copied

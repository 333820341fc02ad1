"""A LoRA under its publisher's names changes the network as it does under those of diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fdistill.formats.lora_file import LORA_FILE, save_lora
from fdistill.students.export import export_student
from support.text_families_flux2 import HAS_FLUX2, klein, own_flux2_output


@pytest.mark.skipif(not HAS_FLUX2, reason="this diffusers has no FLUX.2")
@pytest.mark.parametrize("naming", ["lora", "comfy-lora"])
def test_diffusers_loads_a_lora_of_flux_2_under_either_naming(naming: str, tmp_path: Path) -> None:
    """Queries, keys and values have one adapter in the publisher's naming, of which here the keys are left out."""
    from peft import LoraConfig

    folder = klein(tmp_path / "klein")
    adapted = DiffusionPipeline.from_pretrained(folder).transformer
    targets = ["to_q", "to_v", "to_out.0", "add_k_proj", "to_qkv_mlp_proj", "linear_in", "proj_out"]
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False), "student")
    save_lora(adapted, folder / LORA_FILE, "transformer")
    assert export_student(folder, naming, tmp_path / "x" / LORA_FILE) == []
    names = load_file(tmp_path / "x" / LORA_FILE)
    if naming == "comfy-lora":
        assert names["diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight"].shape == (4, 16)
        assert names["diffusion_model.double_blocks.1.img_attn.qkv.lora_B.weight"].shape == (48, 4)
        assert "diffusion_model.single_blocks.0.linear1.lora_B.weight" in names
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "x", weight_name=LORA_FILE)
    x_t, embeds = torch.randn(2, 16, 8, 8), torch.randn(2, 512, 24)
    with torch.no_grad():
        found, expected = (
            own_flux2_output(network.eval(), x_t, torch.tensor([0.5, 1.0]), embeds)
            for network in (pipeline.transformer, adapted)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

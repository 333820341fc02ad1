"""Exported LoRAs, under diffusers' names and others, turn the teacher's pipeline into the student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, Lumina2Transformer2DModel
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import load_file

from fdistill.adapters import original_layout
from fdistill.formats.lora_file import LORA_FILE, save_lora
from fdistill.formats.original_lora import original_lora
from fdistill.noise import FlowSchedule
from fdistill.students.export import export_student
from support.lora_students import adapted
from support.text_families import RESOLUTION, TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_families_flux2 import HAS_FLUX2, klein, own_flux2_output
from support.text_pipelines import condition_of, denoiser_of, load_pipeline
from support.thorough import at_night

FAMILIES = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}
LOADED = [name for name, family in FAMILIES.items() if hasattr(getattr(diffusers, family[1]), "load_lora_weights")]
BY_DAY = ("sd3", "sana", "z-image")


def test_all_families_but_pixart_load_loras() -> None:
    assert set(FAMILIES) - set(LOADED) == {"pixart", "pixart-alpha"}


@pytest.mark.parametrize("name", at_night(LOADED, lambda name: name not in BY_DAY))
def test_the_teachers_pipeline_with_an_exported_lora_is_the_student(name: str, tmp_path: Path) -> None:
    folder = FAMILIES[name][0](tmp_path / name)
    pipeline = load_pipeline(folder)
    student: Any = adapted(pipeline, folder)
    assert export_student(folder, "lora", tmp_path / "x" / LORA_FILE) == []
    condition = condition_of(pipeline, ["a thin digit", "seven"], FAMILIES[name][2].get("height", RESOLUTION))
    levels = torch.tensor([1.0, 0.4] if isinstance(student.schedule, FlowSchedule) else [999.0, 300.0])
    x_t = torch.randn(2, *student.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, expected = (each(x_t, levels, condition) for each in (denoiser_of(pipeline), student))
        pipeline.load_lora_weights(tmp_path / "x", weight_name=LORA_FILE)
        found = denoiser_of(pipeline)(x_t, levels, condition)
    assert (before - expected).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


def test_diffusers_reads_lumina_2_under_its_publishers_names() -> None:
    """At the published width, which alone diffusers' converter knows, and for blocks alone."""
    with torch.device("meta"):
        network = Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=1)
    shapes = network.state_dict()
    draws, given = torch.Generator().manual_seed(0), {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and re.match(r"(layers|noise_refiner|context_refiner)\.", name):
            given[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=draws)
            given[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=draws)
    layout = original_layout("Lumina2Transformer2DModel", shapes, network.config)
    made = original_lora(given, "transformer", layout or {}, shapes)
    found = lora_conversion_utils._convert_non_diffusers_lumina2_lora_to_diffusers(made)
    assert found.keys() == given.keys()
    for name in given:
        if ".lora_A." in name:
            updates = (each[name.replace(".lora_A.", ".lora_B.")] @ each[name][:, :8] for each in (found, given))
            torch.testing.assert_close(*updates, rtol=0, atol=1e-4)

"""From a LoRA to a fast LoRA: what docs/fast-lora.md promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from fdistill import distill
from fdistill.students.export import export_student
from support.text_families import sd15
from support.text_runs import LORA, PROMPTS, SETTINGS


def test_a_fast_lora_of_a_teacher_with_a_lora_is_loaded_beside_it(tmp_path: Path) -> None:
    """The base, the user's own LoRA at its scale and the student's adapters are the student, in plain diffusers."""
    layer, own = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", tmp_path / "my-style.safetensors"
    teacher, prompts = sd15(tmp_path / "sd15"), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    draws = torch.Generator().manual_seed(0)
    save_file(
        {
            f"unet.{layer}.lora_A.weight": torch.randn(2, 8, generator=draws),
            f"unet.{layer}.lora_B.weight": torch.randn(8, 2, generator=draws),
        },
        own,
    )
    run: dict[str, Any] = {**SETTINGS, **LORA, "iterations": 2, "teacher_lora": str(own), "teacher_lora_scale": 0.5}
    student = distill("digits", output=tmp_path / "run", teacher=str(teacher), prompts=str(prompts), **run)
    note, *_ = export_student(student, "lora", tmp_path / "fast.safetensors")
    assert "load both, my-style.safetensors with weight 0.5 and fast.safetensors with weight 1" in note
    assert "| teacher_lora | my-style.safetensors |" in (student / "README.md").read_text()
    pipeline: Any = DiffusionPipeline.from_pretrained(teacher)
    pipeline.load_lora_weights(tmp_path, weight_name=own.name, adapter_name="style")
    pipeline.load_lora_weights(tmp_path, weight_name="fast.safetensors", adapter_name="fast")
    pipeline.set_adapters(["style", "fast"], [0.5, 1.0])
    given = (torch.randn(2, 4, 8, 8, generator=draws), 500, pipeline.encode_prompt(["a cat"] * 2, "cpu", 1, False)[0])
    with torch.no_grad():
        found = pipeline.unet(*given).sample
        expected = DiffusionPipeline.from_pretrained(student).unet(*given).sample
        pipeline.set_adapters(["fast"], [1.0])
        alone = pipeline.unet(*given).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (alone - expected).abs().max() > 1e-2
    export_student(student, "comfy-lora", tmp_path / "four.safetensors")
    nodes = json.loads((tmp_path / "four.json").read_text())
    loaders = {node["class_type"]: node["inputs"] for node in nodes.values() if "Lora" in node["class_type"]}
    strengths = {"strength_model": 0.5, "strength_clip": 0.5}
    assert loaders["LoraLoader"].items() >= {"lora_name": "my-style.safetensors", **strengths}.items()
    assert nodes[loaders["LoraLoaderModelOnly"]["model"][0]]["class_type"] == "LoraLoader"

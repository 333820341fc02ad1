"""The types of weights in exported files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from fdistill.base.errors import ArgumentError
from fdistill.commands import tiny_pipelines
from fdistill.students.export import export_student
from support.tiny_stable_diffusion import tiny_pipeline


def test_weights_keep_their_type_unless_asked(tmp_path: Path) -> None:
    folder = tiny_pipeline("sd1", tmp_path / "student")
    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for own in (torch.float16, torch.float32):
        StableDiffusionPipeline.from_pretrained(folder, torch_dtype=own).save_pretrained(folder)
        for dtype, expected in {None: own, **types}.items():
            export_student(folder, "comfy", tmp_path / "a.safetensors", dtype)
            found = load_file(tmp_path / "a.safetensors").values()
            assert {value.dtype for value in found if value.is_floating_point()} == {expected}


@pytest.mark.parametrize(("kind", "matrix"), [("unet", "conv_out.weight"), ("transformer", "proj_out.weight")])
def test_eight_bits_are_for_the_networks_matrices(kind: str, matrix: str, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    if kind == "unet":
        tiny_pipeline("sd1", folder)
    else:
        tiny_pipelines.tiny_pipeline("StableDiffusion3Pipeline").save_pretrained(folder)
    network = getattr(DiffusionPipeline.from_pretrained(folder), kind)
    with torch.no_grad():
        network.get_parameter(matrix).view(-1)[0] = 1000.0  # beyond what eight bits hold
    network.save_pretrained(folder / kind)
    for dtype in ("fp32", "fp8"):
        export_student(folder, "comfy", tmp_path / f"{dtype}.safetensors", dtype)
    whole, small = (load_file(tmp_path / f"{dtype}.safetensors") for dtype in ("fp32", "fp8"))
    eight = {name for name, value in small.items() if value.dtype == torch.float8_e4m3fn}
    assert eight == {n for n, v in whole.items() if n.startswith("model.diffusion_model.") and v.ndim > 1}
    others = [value for name, value in small.items() if name not in eight and value.is_floating_point()]
    assert {value.dtype for value in others} == {torch.bfloat16}
    for name in eight:  # three bits of mantissa, and 2**-9 where numbers are smallest
        torch.testing.assert_close(small[name].float(), whole[name].clamp(-448, 448), rtol=2**-4, atol=2**-10)
    with pytest.raises(ArgumentError, match=r"'fp8' for format lora.*or format comfy"):
        export_student(folder, "lora", tmp_path / "x.safetensors", "fp8")

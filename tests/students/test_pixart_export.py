"""PixArt's published networks have learned variances, which students don't have; programs that read one expect both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fdistill.adapters import original_layout
from fdistill.formats.comfy import NETWORK
from fdistill.students.export import export_student
from support.lora_students import adapted
from support.text_dits import inputs, own_output
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_pipelines import denoiser_of, load_pipeline


def published_layer(network: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last layer's tensors of a file with the publisher's names, under diffusers' names."""
    layout = original_layout(type(network).__name__, network.state_dict(), network.config)
    assert layout is not None
    names = {original.parts[0]: NETWORK + name for name, original in layout.items()}
    return {name: tensors[names[name]] for name in ("proj_out.weight", "proj_out.bias")}


def test_whole_weights_predict_the_same_in_a_network_with_variances(tmp_path: Path) -> None:
    folder = TEXT_FAMILIES_DIT["pixart"][0](tmp_path / "student")
    whole: Any = load_pipeline(folder).transformer
    assert whole.config.out_channels == 2 * whole.config.in_channels
    pipeline = load_pipeline(folder)
    student = denoiser_of(pipeline)  # cuts the pipeline's network
    pipeline.save_pretrained(folder)

    export_student(folder, "comfy", tmp_path / "whole.safetensors")
    whole.load_state_dict(published_layer(whole, load_file(tmp_path / "whole.safetensors")), strict=False)
    x_t, t, condition = inputs(student, 2)
    means, variances = own_output(whole, x_t, t, condition).chunk(2, dim=1)
    torch.testing.assert_close(means, own_output(student.network, x_t, t, condition), rtol=1e-5, atol=1e-6)
    assert not variances.any()


def test_adapters_change_the_means_of_a_network_with_variances(tmp_path: Path) -> None:
    folder = TEXT_FAMILIES_DIT["pixart"][0](tmp_path / "student")
    whole: Any = load_pipeline(folder).transformer
    student = adapted(load_pipeline(folder), folder)
    x_t, t, condition = inputs(student, 2)
    before, _ = own_output(copy.deepcopy(whole), x_t, t, condition).chunk(2, dim=1)

    export_student(folder, "comfy-lora", tmp_path / "lora.safetensors")
    for name, up in (tensors := load_file(tmp_path / "lora.safetensors")).items():
        if name.endswith("lora_B.weight"):
            layer = name.removeprefix("transformer.").removesuffix(".lora_B.weight")
            delta = up.flatten(1) @ tensors[name.replace("lora_B", "lora_A")].flatten(1)
            weight = whole.get_submodule(layer).weight
            weight.data += delta.view_as(weight)  # fails if the rows differ in number
    means, _ = own_output(whole, x_t, t, condition).chunk(2, dim=1)
    torch.testing.assert_close(means, own_output(student.network, x_t, t, condition), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(means, before, rtol=1e-2)

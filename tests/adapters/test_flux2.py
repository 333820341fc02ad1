"""FLUX.2's networks are told what their pipelines tell them; and what of them is not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from fdistill.adapters.parametrisation import scheduler_config
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition
from support.text_families_flux2 import HAS_FLUX2, TEXT_FAMILIES_FLUX2
from support.text_pipelines import condition_of, denoiser_of, encoders, load_pipeline, text_of

if not HAS_FLUX2:
    pytest.skip("this diffusers has no FLUX.2", allow_module_level=True)

from fdistill.adapters import flux2

PROMPTS = ["A bold handwritten seven", "a thin digit, drawn with a pencil"]


def captured(network: nn.Module, call: Any) -> list[dict[str, Any]]:
    """What every evaluation of the network in `call` is given."""
    seen: list[dict[str, Any]] = []
    handle = network.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(dict(zip(("hidden_states",), args, strict=False)) | kwargs),
        with_kwargs=True,
    )
    with torch.no_grad():
        call()
    handle.remove()
    return seen


@pytest.mark.parametrize("name", TEXT_FAMILIES_FLUX2)
def test_the_network_is_told_what_its_pipeline_tells_it(name: str, tmp_path: Path) -> None:
    """Of an image that is wider than high."""
    pipeline = load_pipeline(TEXT_FAMILIES_FLUX2[name][0](tmp_path / name))
    size: dict[str, Any] = {"height": 8, "width": 12, "num_inference_steps": 2, "guidance_scale": 3.0}
    theirs = captured(pipeline.transformer, lambda: pipeline(prompt=PROMPTS, output_type="latent", **size))
    denoiser, condition = denoiser_of(pipeline), condition_of(pipeline, PROMPTS, 16)
    assert {key: tuple(value.shape[1:]) for key, value in condition.tensors.items()} == denoiser.text_shapes
    told = [condition]
    if name == "flux2-klein":
        with torch.no_grad():
            told += [text_of(pipeline).encode_null(encoders(pipeline), "", 16).repeated(2)]
    else:
        assert denoiser.embedded_guidance == 4.0
        denoiser.embedded_guidance = 3.0
    assert len(theirs) == 2 * len(told)
    for given, text in zip(theirs, told * 2, strict=True):
        ours = evaluated(denoiser, given, text)
        for key in ("hidden_states", "timestep", "encoder_hidden_states", "img_ids", "txt_ids", "guidance"):
            expected = given[key]
            if expected is None:
                assert ours[key] is None
            else:  # one prompt alone is rounded otherwise than beside another
                expected = expected[0] if key.endswith("ids") else expected
                torch.testing.assert_close(ours[key].double(), expected.double(), rtol=1e-5, atol=2e-5)


def evaluated(denoiser: Any, given: dict[str, Any], text: TextCondition) -> dict[str, Any]:
    """What the denoiser tells the network when it is given the same tokens and level."""
    x_t: Tensor = given["hidden_states"].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    (ours,) = captured(denoiser.network, lambda: denoiser(x_t, given["timestep"].float(), text))
    return ours


def test_variants_that_are_not_supported_are_refused() -> None:
    flow, vp = (scheduler_config(scheduler()) for scheduler in (FlowMatchEulerDiscreteScheduler, DDPMScheduler))
    with pytest.raises(CheckpointError, match="expected a flow-matching scheduler"):
        flux2.wrap(flux2.tiny_transformer(), vp)
    with pytest.raises(CheckpointError, match="16 input and 8 output channels"):
        flux2.wrap(flux2.tiny_transformer(out_channels=8), flow)


def test_other_networks_are_told_the_same_guidance_if_they_take_one() -> None:
    flow = scheduler_config(FlowMatchEulerDiscreteScheduler())
    denoiser = flux2.wrap(flux2.tiny_transformer(guidance_embeds=True), flow)
    denoiser.embedded_guidance = 2.5
    assert denoiser.with_network(flux2.tiny_transformer(guidance_embeds=True)).embedded_guidance == 2.5
    assert denoiser.with_network(flux2.tiny_transformer()).embedded_guidance is None

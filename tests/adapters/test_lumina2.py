"""Lumina 2 on padded captions computes what its class's own forward does, which waits for their lengths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from diffusers.loaders import single_file_utils
from torch import Tensor

from fdistill.adapters import lumina2, wrap
from fdistill.adapters.original_names import assemble
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.condition import TextCondition
from fdistill.guidance import GuidedDenoiser
from support.text_dits import adapters_and_checkpointing, own_output, tiny
from support.text_pipelines import condition_of, denoiser_of, encoders, load_pipeline, text_of

FLOW = scheduler_config(FlowMatchEulerDiscreteScheduler())
PROMPTS = ["a bold handwritten seven", "a thin digit, drawn with a pencil"]


def captions(lengths: list[int]) -> TextCondition:
    mask = torch.arange(256) < torch.tensor(lengths)[:, None]
    embeds = torch.randn(len(lengths), 256, 24, generator=torch.Generator().manual_seed(0))  # the padding as well
    return TextCondition({"prompt_embeds": embeds, "prompt_attention_mask": mask.long()})


@pytest.mark.parametrize("lengths", [[20, 1, 255, 256], [30, 30]], ids=["all", "equal"])
def test_padded_captions_are_computed_as_the_class_does(lengths: list[int]) -> None:
    """Output, features, and the gradients of latents and weights."""
    denoiser = tiny("lumina2")
    network: Any = denoiser.network
    own, condition = copy.deepcopy(network), captions(lengths)
    x_t = torch.randn(len(lengths), *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    t, blocks = torch.linspace(1.0, 0.02, len(lengths)), ("block0", "block3")
    tokens: list[Tensor] = []
    for block in (own.layers[0], own.layers[3]):
        block.register_forward_hook(lambda module, given, output: tokens.append(output))
    found: list[tuple[Tensor, ...]] = []
    for called in (network, own):
        given = x_t.clone().requires_grad_()
        if called is network:
            prediction, features = denoiser.predict(given, t, condition, blocks)
            output, images = prediction.output, [features[name] for name in blocks]
        else:
            output, count = own_output(own, given, t, condition), 16
            rows = [torch.stack([one[n : n + count] for one, n in zip(each, lengths, strict=True)]) for each in tokens]
            images = [each.transpose(1, 2).unflatten(2, (4, 4)) for each in rows]
        gradients = torch.autograd.grad(output.square().sum(), [given, *called.parameters()])
        found.append((output, *images, *(each / each.abs().max().clamp(min=1e-6) for each in gradients)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert found[0][0].std() > 0.1
    assert all(gradient.abs().max() > 0.9 for gradient in found[0][3:])  # none is zero


def test_images_that_are_not_square_are_computed_as_the_class_does() -> None:
    denoiser, condition = tiny("lumina2"), captions([40])
    for shape in ((4, 16), (16, 6)):
        x_t, t = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(2)), torch.tensor([0.5])
        expected = own_output(denoiser.network, x_t, t, condition)
        torch.testing.assert_close(denoiser.predict(x_t, t, condition)[0].output, expected, rtol=1e-5, atol=1e-5)


def test_adapters_and_checkpointing_pass_through_the_networks_own_call() -> None:
    adapters_and_checkpointing(tiny("lumina2"), captions([20, 33]))


@pytest.mark.parametrize("negative", ["", "a blurry digit"])
def test_the_network_is_told_what_its_pipeline_tells_it(negative: str, tmp_path: Path) -> None:
    """With the instruction before prompts, and without it before the negative one."""
    tiny_pipeline("Lumina2Pipeline").save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, given, named: seen.append(named), with_kwargs=True)
    size = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    pipeline(PROMPTS, negative_prompt=[negative] * 2, guidance_scale=3.0, **size)
    null = text_of(pipeline).encode_null(encoders(pipeline), negative, 64)
    told = condition_of(pipeline, PROMPTS, 64)
    assert {key: tuple(value.shape[1:]) for key, value in told.tensors.items()} == denoiser_of(pipeline).text_shapes
    names = {"prompt_embeds": "encoder_hidden_states", "prompt_attention_mask": "encoder_attention_mask"}
    for condition, given in zip((told, null.repeated(2)), seen, strict=True):
        for name, argument in names.items():
            torch.testing.assert_close(condition[name], given[argument], rtol=1e-5, atol=1e-5)
    lengths = told["prompt_attention_mask"].sum(1).tolist()
    assert min(lengths) > 25 > int(null["prompt_attention_mask"].sum())


@torch.no_grad()
def test_a_guided_step_is_the_pipelines(tmp_path: Path) -> None:
    """Which brings the norm of each row back to the conditional one's: guidance_rescale=1."""
    tiny_pipeline("Lumina2Pipeline").save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    stepped: list[Tensor] = []
    x_t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    pipeline(
        PROMPTS,
        guidance_scale=3.0,
        latents=x_t,
        callback_on_step_end=lambda _pipeline, _step, _time, now: stepped.append(now["latents"]) or {},
        **{"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"},
    )
    sigma, following = pipeline.scheduler.sigmas[:2]
    null, told = text_of(pipeline).encode_null(encoders(pipeline), "", 64), condition_of(pipeline, PROMPTS, 64)
    found = []
    for rescale in (1.0, 0.0):
        guided = GuidedDenoiser(denoiser_of(pipeline), 3.0, null=null, rescale=rescale)
        velocity = (x_t - guided(x_t, sigma.expand(2), told)) / sigma
        found.append(x_t + (following - sigma) * velocity)
    torch.testing.assert_close(stepped[0], found[0], rtol=1e-4, atol=1e-4)
    assert (stepped[0] - found[1]).abs().max() > 1e-2


def test_no_value_is_read_from_the_device() -> None:
    """Tensors on the meta device have none, and refuse."""
    denoiser = wrap(lumina2.tiny_transformer().to("meta"), FLOW)
    condition = denoiser.example_condition(2, "meta")
    x0 = denoiser(torch.empty(2, *denoiser.sample_shape, device="meta"), torch.empty(2, device="meta"), condition)
    assert x0.shape == (2, *denoiser.sample_shape)


def test_diffusers_own_converter_takes_the_publishers_names_back() -> None:
    """Of a network of the published width, for which it has the sizes of queries, keys and values."""
    with torch.device("meta"):
        network: Any = Lumina2Transformer2DModel(num_layers=1)
    state = network.state_dict()
    layout = lumina2.FAMILY.original_layout
    assert layout is not None
    made = assemble(layout(state, network.config), state)
    assert made["layers.0.attention.qkv.weight"].shape == (2304 + 2 * 768, 2304)
    back = single_file_utils.convert_lumina2_to_diffusers(dict(made))
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in state.items()}


def test_variants_are_refused() -> None:
    with pytest.raises(CheckpointError, match="expected a flow-matching scheduler"):
        wrap(lumina2.tiny_transformer(), scheduler_config(DPMSolverMultistepScheduler()))
    with pytest.raises(CheckpointError, match=r"axes_lens \[256, 64, 64\]: .* more than 256 positions"):
        wrap(lumina2.tiny_transformer(axes_lens=(256, 64, 64)), FLOW)
    with pytest.raises(CheckpointError, match="16 input and 32 output channels"):
        wrap(lumina2.tiny_transformer(out_channels=32), FLOW)
    with pytest.raises(ArgumentError, match=r"latents of 8 x 130: expected multiples of 2 up to 128"):
        wrap(lumina2.tiny_transformer(), FLOW).resize(8, 130)  # type: ignore[attr-defined]

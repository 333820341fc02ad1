"""Z-Image on captions padded to one length computes what its own network does on lists, and its pipeline with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fdistill.adapters import guidance_offset, wrap
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.quantised_layers import quantised_names
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.condition import TextCondition
from fdistill.generation.generate import open_maker
from fdistill.generation.sampling import Sampling
from fdistill.guidance import GuidedDenoiser
from support.text_dits import adapters_and_checkpointing, own_output, tiny
from support.text_families_dit import HAS_Z_IMAGE
from support.text_pipelines import SIZE, condition_of, denoiser_of, encoders, load_pipeline, text_of

if not HAS_Z_IMAGE:
    pytest.skip("this diffusers has no Z-Image", allow_module_level=True)

from fdistill.adapters import z_image

FLOW = scheduler_config(FlowMatchEulerDiscreteScheduler())
PROMPTS = ["a bold handwritten seven", "a thin digit, drawn with a pencil"]
#: Shorter than the multiple of 32 to which the network pads, one, two of them exactly, just beyond, and the most.
LENGTHS = [20, 1, 32, 33, 64, 512]


def captions(lengths: list[int], width: int) -> TextCondition:
    mask = torch.arange(512) < torch.tensor(lengths)[:, None]
    embeds = torch.randn(len(lengths), 512, width, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    return TextCondition({"prompt_embeds": embeds, "prompt_embeds_mask": mask.long()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("z-image")
    tiny_pipeline("ZImagePipeline").save_pretrained(made)
    return made


@pytest.mark.parametrize("lengths", [LENGTHS, [5, 30]], ids=["all", "short"])
def test_padded_captions_are_computed_as_lists_are(lengths: list[int]) -> None:
    """Output, and the gradients of latents and weights."""
    denoiser = tiny("z-image")
    network: Any = denoiser.network
    own = copy.deepcopy(network)
    condition = captions(lengths, network.config.cap_feat_dim)
    x_t = torch.randn(len(lengths), *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(1.0, 0.02, len(lengths))
    found: list[tuple[Tensor, ...]] = []
    for called in (network, own):
        given = x_t.clone().requires_grad_()
        if called is network:
            output = denoiser.predict(given, t, condition)[0].output
        else:
            output = own_output(own, given, t, condition)
        gradients = torch.autograd.grad(output.square().sum(), [given, *called.parameters()])
        found.append((output, *(gradient / gradient.abs().max().clamp(min=1e-6) for gradient in gradients)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert found[0][0].std() > 0.1
    assert all(gradient.abs().max() > 0.9 for gradient in found[0][1:])  # none is zero


def test_images_of_other_shapes_are_computed_as_lists_are() -> None:
    """Wider than high, and of a multiple of 32 tokens, which need no padding."""
    denoiser = tiny("z-image")
    condition = captions([40], 24)
    for shape in ((4, 16), (16, 8)):
        x_t, t = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(2)), torch.tensor([0.5])
        expected = own_output(denoiser.network, x_t, t, condition)
        torch.testing.assert_close(denoiser.predict(x_t, t, condition)[0].output, expected, rtol=1e-5, atol=1e-5)


def test_adapters_and_checkpointing_pass_through_the_networks_own_call() -> None:
    adapters_and_checkpointing(tiny("z-image"), captions([20, 33], 24))


@pytest.mark.parametrize("negative", ["", "a blurry digit"])
def test_a_guided_step_is_the_pipelines_at_one_less(negative: str, folder: Path) -> None:
    """What the pipeline tells the network, and its guidance_scale g: c + g (c - u), which is s = g + 1 here."""
    pipeline = load_pipeline(folder)
    seen: list[Any] = []

    def hook(_module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        seen.append((*arguments, output[0]))

    handle = pipeline.transformer.register_forward_hook(hook)
    stepped: list[Tensor] = []
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 2 * SIZE, "width": 2 * SIZE, "output_type": "latent"}
    pipeline(
        list(PROMPTS),  # in which the pipeline writes
        negative_prompt=[negative] * 2,
        guidance_scale=3.0,
        callback_on_step_end=lambda _pipeline, _step, _time, now: stepped.append(now["latents"]) or {},
        generator=torch.Generator().manual_seed(4),
        **call,
    )
    handle.remove()
    latents, time, texts, output = seen[0]
    null = text_of(pipeline).encode_null(encoders(pipeline), negative, 2 * SIZE)
    told = TextCondition.concat([condition_of(pipeline, PROMPTS, 2 * SIZE), null.repeated(2)])
    denoiser = denoiser_of(pipeline)
    assert {key: tuple(value.shape[1:]) for key, value in told.tensors.items()} == denoiser.text_shapes
    for row, text in enumerate(texts):
        assert told["prompt_embeds_mask"][row].tolist() == [1] * len(text) + [0] * (512 - len(text))
        torch.testing.assert_close(told["prompt_embeds"][row, : len(text)], text, rtol=1e-5, atol=1e-5)
        assert not told["prompt_embeds"][row, len(text) :].any()
    x_t = torch.stack(latents)[:, :, 0]
    with torch.no_grad():
        made = denoiser.predict(x_t, 1 - time, told)[0].output
        torch.testing.assert_close(-made, torch.stack(output)[:, :, 0], rtol=1e-4, atol=1e-5)
        x0 = GuidedDenoiser(denoiser, 4.0, null=null)(x_t[:2], 1 - time[:2], told.rows(slice(2)))
    sigma, following = pipeline.scheduler.sigmas[:2]
    velocity = (x_t[:2] - x0) / sigma
    torch.testing.assert_close(stepped[0], x_t[:2] + (following - sigma) * velocity, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_makes_images_is_told_one_less(folder: Path) -> None:
    assert (guidance_offset("ZImagePipeline"), guidance_offset("FluxPipeline")) == (-1, 0)
    for scale, evaluations in ((1.0, 2), (3.0, 4)):
        sampling = Sampling(num_steps=2, guidance_scale=scale, resolution=16, sampler="pipeline")
        maker: Any = open_maker(folder, torch.device("cpu"), sampling)
        with maker.counted() as counted:
            maker.sample(0, [0], PROMPTS[:1], torch.device("cpu"))
            counted.images = 1
        assert (counted.per_image, maker.guidance_scale) == (evaluations, scale)
        assert maker._pipeline.guidance_scale == scale - 1


def test_no_value_is_read_from_the_device() -> None:
    """Tensors on the meta device have none, and refuse."""
    denoiser = wrap(z_image.tiny_transformer().to("meta"), FLOW)
    condition = denoiser.example_condition(2, "meta")
    x0 = denoiser(torch.empty(2, *denoiser.sample_shape, device="meta"), torch.empty(2, device="meta"), condition)
    assert x0.shape == (2, *denoiser.sample_shape)


def test_the_linear_layers_of_all_blocks_are_stored_in_few_bits() -> None:
    network = z_image.tiny_transformer()
    linear = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    outside = ("all_x_embedder.", "all_final_layer.", "t_embedder.", "cap_embedder.")
    assert quantised_names(network) == [name for name in linear if not name.startswith(outside)]
    assert len(quantised_names(network)) == 6 * 7 + 5  # attention and feed-forward of six, modulation of five


def test_variants_are_refused() -> None:
    with pytest.raises(CheckpointError, match="expected a flow-matching scheduler"):
        wrap(z_image.tiny_transformer(), scheduler_config(DPMSolverMultistepScheduler()))
    with pytest.raises(CheckpointError, match=r"siglip_feat_dim 8: of Z-Image's.*expected None"):
        wrap(z_image.tiny_transformer(siglip_feat_dim=8), FLOW)
    with pytest.raises(CheckpointError, match=r"axes_lens \[300, 64, 64\]: expected .* at least 514 positions"):
        wrap(z_image.tiny_transformer(axes_lens=(300, 64, 64)), FLOW)
    with pytest.raises(CheckpointError, match=r"all_patch_size \[4\]"):
        wrap(z_image.tiny_transformer(all_patch_size=(4,)), FLOW)
    with pytest.raises(ArgumentError, match=r"latents of 130 x 130: expected multiples of 2 up to 128"):
        wrap(z_image.tiny_transformer(), FLOW).resize(130, 130)  # type: ignore[attr-defined]

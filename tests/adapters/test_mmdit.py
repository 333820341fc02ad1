"""Stable Diffusion 3 and Flux as their own networks and pipelines compute them, and what the schedulers of
text-to-image students draw.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from torch import Tensor, nn

from fdistill.adapters import flux, sd3, unet2d_condition, wrap
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.condition import TextCondition
from fdistill.noise import FlowSchedule
from support.text_families import (
    RESOLUTION,
    TEXT_FAMILIES,
    flux_transformer,
    sd3_transformer,
    sd3_without_t5,
    tiny_condition_unet,
)
from support.text_pipelines import SIZE, condition_of, denoiser_of, encoders, load_pipeline, network_of, text_of
from support.thorough import at_night

MMDIT = ("sd3", "flux-dev", "flux-schnell", "sd35-large")
#: By night, what runs by day with the other kind of Stable Diffusion 3, but for the x0 of its pipeline.
MMDIT_BY_DAY = at_night(MMDIT, lambda name: name == "sd35-large")
PROMPTS = ["a bold handwritten seven", "a thin digit"]
NAMES = [*TEXT_FAMILIES, "sd3-without-t5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("text")
    made = {name: write(base / name) for name, (write, _, _) in TEXT_FAMILIES.items()}
    return made | {"sd3-without-t5": sd3_without_t5(base / "sd3-without-t5")}


def load(folder: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    return load_pipeline(folder, **absent)


def random_condition(denoiser: TextDenoiser, count: int) -> TextCondition:
    torch.manual_seed(3)
    return TextCondition({key: torch.randn(count, *shape) for key, shape in denoiser.text_shapes.items()})


def mmdit(name: str) -> TextDenoiser:
    if name.startswith("sd3"):
        network = sd3_transformer(dual_attention_layers=(0,) if name == "sd3" else ())
    else:
        network = flux_transformer(guidance_embeds=name == "flux-dev")
    denoiser: Any = wrap(network, scheduler_config(FlowMatchEulerDiscreteScheduler()))
    denoiser.resize(SIZE, SIZE)
    return denoiser


def inputs(denoiser: TextDenoiser, count: int = 3) -> tuple[Tensor, Tensor, TextCondition]:
    condition = random_condition(denoiser, count)
    return torch.randn(count, *denoiser.sample_shape), torch.tensor([1.0, 0.6, 0.02])[:count], condition


def own_output(network: Any, x_t: Tensor, t: Tensor, condition: TextCondition, guidance: float | None) -> Tensor:
    """What the transformer says when it is called as its pipeline calls it, [B, C, H, W]."""
    embeds, pooled = condition["prompt_embeds"], condition["pooled_prompt_embeds"]
    if type(network).__name__.startswith("SD3"):
        output: Tensor = network(
            hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample
        return output
    count, channels, height, width = x_t.shape
    tokens = network(
        hidden_states=FluxPipeline._pack_latents(x_t, count, channels, height, width),
        timestep=t,
        guidance=None if guidance is None else torch.full([count], guidance),
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
    ).sample
    return unpacked(tokens)


def unpacked(tokens: Tensor) -> Tensor:
    output: Tensor = FluxPipeline._unpack_latents(tokens, RESOLUTION, RESOLUTION, RESOLUTION // SIZE)
    return output


def blocks_of(network: Any) -> list[nn.Module]:
    return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]


@pytest.mark.parametrize("name", MMDIT_BY_DAY)
def test_the_network_itself_runs_and_its_blocks_are_the_features(name: str) -> None:
    denoiser = mmdit(name)
    assert denoiser.sample_shape == (16, 8, 8)
    x_t, t, condition = inputs(denoiser)
    guidance = 2.0 if name == "flux-dev" else None
    if isinstance(denoiser, flux.FluxDenoiser):
        assert denoiser.embedded_guidance == (3.5 if name == "flux-dev" else None)
        denoiser.embedded_guidance = guidance
    made: list[Any] = []
    blocks = blocks_of(denoiser.network)
    handles = [block.register_forward_hook(lambda _module, _inputs, result: made.append(result)) for block in blocks]
    expected = own_output(denoiser.network, x_t, t, condition, guidance)
    for handle in handles:
        handle.remove()
    names = tuple(denoiser.feature_shapes)
    assert names[:4] == ("block0", "block1", "block2", "block3")
    prediction, features = denoiser.predict(x_t, t, condition, names)
    assert torch.equal(prediction.output, expected)
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == denoiser.feature_shapes
    for i, result in enumerate(made):
        image = result[1] if isinstance(result, tuple) else result[:, -16:]
        assert torch.equal(features[f"block{i}"][:, :, 2, 1], image[:, 4 * 2 + 1])
    for depth, block in {"depth25": 1, "depth50": 2, "depth75": 3, "depth99": 3}.items():
        assert torch.equal(features[depth], features[f"block{block}"])
    assert not torch.allclose(features["block1"], features["block2"], atol=1e-3)


def test_single_blocks_that_return_text_and_image_together_are_read_alike() -> None:
    """As those of diffusers 0.34 do."""
    denoiser = mmdit("flux-dev")
    text, image = torch.randn(2, 5, 32), torch.randn(2, 16, 32)
    assert torch.equal(denoiser._read("block2", torch.cat([text, image], 1)), denoiser._read("block2", (text, image)))


@pytest.mark.parametrize("name", MMDIT_BY_DAY)
def test_nothing_beyond_the_last_feature_is_computed(name: str) -> None:
    denoiser = mmdit(name)
    x_t, t, condition = inputs(denoiser)
    blocks = blocks_of(denoiser.network)
    ran: list[int] = []
    for i, block in enumerate([*blocks, denoiser.network.proj_out]):
        block.register_forward_hook(lambda _module, _inputs, _result, i=i: ran.append(i))
    with torch.no_grad():
        full = denoiser.predict(x_t, t, condition, ("block1", "depth50"))[1]
        assert ran == [0, 1, 2, 3, 4]
        ran.clear()
        features = denoiser.features(x_t, t, condition, ("depth50", "block1"))
        assert ran[:2] == [0, 1]
        assert set(ran) <= {0, 1, 2}
        assert all(torch.equal(value, full[key]) for key, value in features.items())
        ran.clear()
        denoiser.features(x_t, t, condition, ("block0",))
    assert set(ran) <= {0}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MMDIT_BY_DAY)
def test_gradients_without_those_of_the_output_are_those_of_the_features(name: str, checkpointing: bool) -> None:
    denoiser = mmdit(name)
    x_t, t, condition = inputs(denoiser)
    denoiser(x_t, t, condition, ("block1",))[1]["block1"].sum().backward()
    expected = {key: p.grad.clone() for key, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad()
    if checkpointing:
        denoiser.network.enable_gradient_checkpointing()
        denoiser.train()
    prediction, features = denoiser.predict(x_t, t, condition, ("block1",), output_grad=False)
    assert not prediction.output.requires_grad
    features["block1"].sum().backward()
    got = {key: p.grad for key, p in denoiser.named_parameters() if p.grad is not None}
    later = [f"transformer_blocks.{i}." for i in (2, 3)] + ["single_transformer_blocks", "proj_out"]
    assert any("transformer_blocks.1." in key for key in got)
    assert not any(part in key for key in got for part in later)
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)
    assert {key for key, gradient in expected.items() if gradient.any()} <= got.keys()


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_x0_is_what_the_pipelines_own_scheduler_says(name: str, folders: dict[str, Path]) -> None:
    pipeline = load(folders[name])
    denoiser, network, condition = (
        denoiser_of(pipeline),
        network_of(pipeline),
        condition_of(pipeline, PROMPTS, RESOLUTION),
    )
    x_t = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    guidance = 3.5 if name == "flux-dev" else None
    with torch.no_grad():
        for share in (1.0, 0.6, 0.25, 0.005):
            if name in MMDIT:
                scheduler: Any = FlowMatchEulerDiscreteScheduler()
                scheduler.set_timesteps(sigmas=[share])
                raw = own_output(network, x_t, torch.full([2], share), condition, guidance)
                expected = scheduler.step(raw, scheduler.timesteps[0], x_t).prev_sample
                level = share
            else:
                level = float(round(600 * share))  # where rounding is enlarged at most three times
                scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
                scheduler.set_timesteps(1000)
                added = {key: condition[key] for key in ("text_embeds", "time_ids")} if name == "sdxl" else None
                raw = network(x_t, level, condition["prompt_embeds"], added_cond_kwargs=added).sample
                expected = scheduler.step(raw, int(level), x_t).pred_original_sample
            x0 = denoiser(x_t, torch.full((2,), level), condition)
            torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)


def captured(network: nn.Module, call: Any) -> list[dict[str, Any]]:
    """The arguments of every evaluation of the network in `call`."""
    seen: list[dict[str, Any]] = []
    names = ("sample", "timestep") if "UNet" in type(network).__name__ else ("hidden_states",)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        given |= given.pop("added_cond_kwargs", None) or {}
        seen.append({key: value for key, value in given.items() if isinstance(value, Tensor)})

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        call()
    handle.remove()
    return seen


#: By day, each family with one or two of the three, in turns.
TOLD = [
    (name, guided, negative)
    for name in NAMES
    for guided, negative in ((False, ""), (True, ""), (True, "a blurry digit"))
]


@pytest.mark.parametrize(
    ("name", "guided", "negative"), at_night(TOLD, lambda told: TOLD.index(told) % 2 == 1 or told[0] == "sd35-large")
)
def test_the_network_is_told_what_its_pipeline_tells_it(
    name: str, guided: bool, negative: str, folders: dict[str, Path]
) -> None:
    pipeline = load(folders[name])
    denoiser = denoiser_of(pipeline)
    is_flux = isinstance(denoiser, flux.FluxDenoiser)
    arguments: dict[str, Any] = {"guidance_scale": 4.0 if guided else 1.0}
    if is_flux:
        arguments = {"guidance_scale": 2.5, "true_cfg_scale": 4.0 if guided else 1.0}
    if guided and (negative or is_flux):
        arguments["negative_prompt"] = [negative] * 2
    size = {"height": RESOLUTION, "width": RESOLUTION}
    calls = captured(
        denoiser.network,
        lambda: pipeline(PROMPTS, num_inference_steps=2, **size, **arguments, output_type="latent"),
    )
    text = pipeline if name == "sd3-without-t5" else encoders(pipeline)
    with torch.no_grad():  # another kernel, that rounds otherwise, would run with gradients
        condition = text_of(pipeline).encode_prompts(text, PROMPTS, RESOLUTION)
        null = text_of(pipeline).encode_null(text, negative, RESOLUTION)
    assert len(null) == 1
    if name != "sd3-without-t5":  # where diffusers 0.34 has zeros for 77 tokens, and newer ones for 256
        assert {key: tuple(value.shape[1:]) for key, value in condition.tensors.items()} == denoiser.text_shapes
    if name == "flux-dev":
        denoiser.embedded_guidance = 2.5
    scale = 1000.0 if isinstance(denoiser.schedule, FlowSchedule) and not is_flux else 1.0
    assert len(calls) >= (4 if guided and is_flux else 2)
    for index, given in enumerate(calls):
        told = condition
        if guided:
            told = null.repeated(2) if is_flux else TextCondition.concat([null.repeated(2), condition])
            told = condition if is_flux and index % 2 == 0 else told
        latents = given["hidden_states" if "hidden_states" in given else "sample"]
        x_t = unpacked(latents) if is_flux else latents
        t = given["timestep"].float().expand(len(x_t)) / scale
        (ours,) = captured(denoiser.network, lambda x_t=x_t, t=t, told=told: denoiser(x_t, t, told))
        assert ours.keys() == given.keys()
        for key, value in given.items():
            # One prompt alone is rounded otherwise than beside another.
            atol = 2e-5 if guided else 0
            torch.testing.assert_close(ours[key], value.float().expand_as(ours[key]), rtol=1e-6, atol=atol)


def test_a_folded_guidance_is_the_one_told(folders: dict[str, Path], tmp_path: Path) -> None:
    denoiser = mmdit("flux-dev")
    assert isinstance(denoiser, flux.FluxDenoiser)
    x_t, t, condition = inputs(denoiser)
    guided = copy.deepcopy(denoiser.network)
    flux.fold_guidance(denoiser.network, 2.0)
    assert not denoiser.network.config.guidance_embeds
    with torch.no_grad():
        expected = own_output(guided, x_t, t, condition, 2.0)
        other = own_output(guided, x_t, t, condition, 3.5)
        got = own_output(denoiser.network, x_t, t, condition, None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (other - expected).abs().max() > 1e-4
    assert not any("guidance" in key for key in denoiser.network.state_dict())
    assert denoiser.with_network(denoiser.network).embedded_guidance is None

    pipeline = load(folders["flux-dev"])
    call: dict[str, Any] = {"height": RESOLUTION, "width": RESOLUTION, "num_inference_steps": 1, "output_type": "np"}
    latents = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    told = pipeline(PROMPTS, **call, guidance_scale=3.5, latents=latents).images
    flux.fold_guidance(pipeline.transformer, 3.5)
    pipeline.save_pretrained(tmp_path)
    folded = load(tmp_path)
    images = folded(PROMPTS, **call, guidance_scale=0.0, latents=latents).images
    torch.testing.assert_close(torch.from_numpy(images), torch.from_numpy(told), rtol=0, atol=1e-5)


def test_guidance_is_folded_into_half_precision_as_the_network_computes_it() -> None:
    network = flux_transformer().to(torch.bfloat16)
    told = network.time_text_embed
    pooled, t = torch.randn(1, 16).to(torch.bfloat16), torch.tensor([500.0]).to(torch.bfloat16)
    expected = told(t, torch.tensor([3.5]).to(torch.bfloat16) * 1000, pooled).float()
    flux.fold_guidance(network, 3.5)
    assert next(network.time_text_embed.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(network.time_text_embed(t, pooled).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", MMDIT_BY_DAY)
def test_another_network_is_read_alike_at_the_same_size(name: str) -> None:
    denoiser = mmdit(name)
    denoiser.resize(12, 12)
    if isinstance(denoiser, flux.FluxDenoiser) and denoiser.embedded_guidance is not None:
        denoiser.embedded_guidance = 1.5
    other = denoiser.with_network(copy.deepcopy(denoiser.network))  # type: ignore[operator]
    assert other.sample_shape == (16, 12, 12)
    assert other.feature_shapes["depth75"][1:] == (6, 6)
    assert other.input_form() == denoiser.input_form()
    assert getattr(other, "embedded_guidance", None) == getattr(denoiser, "embedded_guidance", None)
    x_t, t, condition = inputs(denoiser)
    assert torch.equal(other(x_t, t, condition), denoiser(x_t, t, condition))


@pytest.mark.parametrize("name", MMDIT_BY_DAY)
def test_a_bfloat16_network_takes_float32_latents_and_prompts(name: str) -> None:
    denoiser = mmdit(name)
    x_t, t, condition = inputs(denoiser)
    expected = denoiser(x_t, t, condition)
    x0 = denoiser.to(torch.bfloat16)(x_t, t, condition)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, expected, rtol=0.1, atol=0.1)


FLOW = scheduler_config(FlowMatchEulerDiscreteScheduler())


def test_networks_that_want_more_than_noise_are_refused() -> None:
    with pytest.raises(CheckpointError, match="33 input and 16 output channels: expected as many outputs as inputs"):
        sd3.wrap(sd3_transformer(in_channels=33, out_channels=16), FLOW)
    for fill_or_control in (384, 128):
        with pytest.raises(CheckpointError, match=r"64 output channels .* fill and control"):
            flux.wrap(flux_transformer(in_channels=fill_or_control, out_channels=64), FLOW)
    for change in ({"in_channels": 18}, {"patch_size": 2}):
        with pytest.raises(CheckpointError, match="a multiple of 4, and patch_size 1"):
            flux.wrap(flux_transformer(**change), FLOW)
    with pytest.raises(CheckpointError, match="inpainting"):
        unet2d_condition.wrap(tiny_condition_unet(in_channels=9), scheduler_config(DDPMScheduler()))


def test_schedulers_and_sizes_that_do_not_fit_are_refused() -> None:
    for adapter, network in ((sd3, sd3_transformer()), (flux, flux_transformer())):
        with pytest.raises(CheckpointError, match="with DDPMScheduler: expected a flow-matching scheduler"):
            adapter.wrap(network, scheduler_config(DDPMScheduler()))
    for name, size, message in (
        ("sd3", 7, "multiples of 2 up to 16"),
        ("sd3", 18, "up to 16"),
        ("flux-dev", 7, "of 2"),
    ):
        with pytest.raises(ArgumentError, match=message):
            mmdit(name).resize(size, size)
    with pytest.raises(ArgumentError, match="guidance_embeds"):
        flux.fold_guidance(flux_transformer(guidance_embeds=False), 3.5)
    with pytest.raises(ArgumentError, match="TextCondition"):
        mmdit("sd3")(torch.zeros(1, 16, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))


def test_missing_encoders_are_named(folders: dict[str, Path]) -> None:
    pipeline = load(folders["sd3-without-t5"])
    with pytest.raises(CheckpointError, match=r"without text_encoder_3: .* expected the transformer beside"):
        sd3.encode_prompts(encoders(pipeline), PROMPTS, RESOLUTION)
    pipeline.text_encoder_2 = None
    with pytest.raises(CheckpointError, match="only text_encoder_3 can be left out"):
        sd3.encode_prompts(pipeline, PROMPTS, RESOLUTION)
    pipeline = load(folders["flux-schnell"])
    pipeline.text_encoder_2 = None
    with pytest.raises(CheckpointError, match="expected both"):
        text_of(pipeline).encode_null(pipeline, "", RESOLUTION)

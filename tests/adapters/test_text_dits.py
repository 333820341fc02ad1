"""PixArt, Sana, Lumina 2, Qwen-Image, Z-Image and FLUX.2 as their own networks, pipelines and schedulers have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    Transformer2DModel,
)
from torch import Tensor, nn

from fdistill.adapters import pixart, sana
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.pretrained import load_network
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.condition import TextCondition
from fdistill.teachers.text_encoders import PromptEncoder
from support.text_dits import FLUX2, VP, blocks_of, inputs, own_output, tiny, unpacked
from support.text_families_dit import (
    HAS_QWEN_IMAGE,
    TEXT_FAMILIES_DIT,
    pixart_transformer,
    qwen_transformer,
    sana_transformer,
)
from support.text_pipelines import condition_of, denoiser_of, encoders, load_pipeline, text_of

if HAS_QWEN_IMAGE:
    from fdistill.adapters import qwen_image
FAMILIES = [name for name in TEXT_FAMILIES_DIT if name not in ("pixart-alpha", "sana-timestep-scale")]
#: Families whose own test says what their networks are told: their pipelines call them otherwise.
OWN_TEST = ("z-image", "lumina2", *FLUX2)
PROMPTS = ["A bold handwritten seven", "a thin digit, drawn with a pencil"]
NEGATIVE = "a blurry digit"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("text")
    return {name: write(base / name) for name, (write, _, _) in TEXT_FAMILIES_DIT.items()}


def call_of(name: str) -> dict[str, Any]:
    return TEXT_FAMILIES_DIT[name][2]


@pytest.mark.parametrize("name", [name for name in TEXT_FAMILIES_DIT if name != "lumina2"])
def test_the_network_itself_runs_and_its_blocks_are_the_features(name: str) -> None:
    denoiser = tiny(name)
    network: Any = denoiser.network
    x_t, t, condition = inputs(denoiser)
    made: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
        made.append(result[1] if isinstance(result, tuple) else result)

    handles = [block.register_forward_hook(hook) for block in blocks_of(denoiser)[1]]
    expected = own_output(network, x_t, t, condition)
    for handle in handles:
        handle.remove()
    names = tuple(denoiser.feature_shapes)
    assert names == ("block0", "block1", "block2", "block3", "depth25", "depth50", "depth75", "depth99")
    prediction, features = denoiser.predict(x_t, t, condition, names)
    assert torch.equal(prediction.output, expected)
    assert prediction.output.shape == x_t.shape
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == denoiser.feature_shapes
    height, width = denoiser.feature_shapes["block0"][1:]
    for i, tokens in enumerate(made):  # those of text stand before the image's in FLUX.2, after them in Z-Image
        first = tokens.shape[1] - height * width if name in FLUX2 else 0
        assert torch.equal(features[f"block{i}"][:, :, 2, 1], tokens[:, first + width * 2 + 1])
    for depth, block in {"depth25": 1, "depth50": 2, "depth75": 3, "depth99": 3}.items():
        assert torch.equal(features[depth], features[f"block{block}"])
    assert not torch.allclose(features["block1"], features["block2"], atol=1e-3)


@pytest.mark.parametrize("name", TEXT_FAMILIES_DIT)
def test_nothing_beyond_the_last_feature_is_computed(name: str) -> None:
    denoiser = tiny(name)
    x_t, t, condition = inputs(denoiser)
    _, blocks, last = blocks_of(denoiser)
    ran: list[int] = []
    for i, module in enumerate([*blocks, last]):
        module.register_forward_hook(lambda _module, _inputs, _result, i=i: ran.append(i))
    with torch.no_grad():
        full = denoiser.predict(x_t, t, condition, ("block1", "depth50"))[1]
        assert ran == [0, 1, 2, 3, 4]
        ran.clear()
        features = denoiser.features(x_t, t, condition, ("depth50", "block1"))
    assert set(ran) <= {0, 1, 2}
    assert ran[:2] == [0, 1]
    assert all(torch.equal(value, full[key]) for key, value in features.items())


@pytest.mark.parametrize("name", TEXT_FAMILIES_DIT)
def test_gradients_without_those_of_the_output_are_those_of_the_features(name: str) -> None:
    denoiser = tiny(name)
    x_t, t, condition = inputs(denoiser)
    denoiser(x_t, t, condition, ("block1",))[1]["block1"].sum().backward()
    expected = {key: p.grad.clone() for key, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad()
    prediction, features = denoiser.predict(x_t, t, condition, ("block1",), output_grad=False)
    assert not prediction.output.requires_grad
    features["block1"].sum().backward()
    got = {key: p.grad for key, p in denoiser.named_parameters() if p.grad is not None}
    listed = blocks_of(denoiser)[0]
    assert any(f"network.{listed}.1." in key for key in got)
    later = (f"{listed}.2.", f"{listed}.3.", "single_", "proj_out", "all_final_layer")
    assert not any(part in key for key in got for part in later)
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)
    assert {key for key, gradient in expected.items() if gradient.any()} <= got.keys()


@pytest.mark.parametrize("name", TEXT_FAMILIES_DIT)
def test_x0_is_what_the_pipelines_own_scheduler_says(name: str, folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(folders[name])
    denoiser, condition = denoiser_of(pipeline), condition_of(pipeline, PROMPTS, call_of(name)["height"])
    x_t = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    scheduler = pipeline.scheduler
    for position in (8, 15, 19):
        if name == "qwen-image" or name in FLUX2:
            scheduler.set_timesteps(sigmas=torch.linspace(1, 0.05, 20).tolist(), mu=0.7)
        else:
            scheduler.set_timesteps(20)
        timestep = scheduler.timesteps[position]
        level = timestep.float() if name in VP else scheduler.sigmas[position]
        with torch.no_grad():
            raw = own_output(denoiser.network, x_t, level.expand(2), condition)
            x0 = denoiser(x_t, level.expand(2), condition)
        scheduler.set_begin_index(position)
        following = scheduler.step(raw, timestep, x_t).prev_sample
        if name in ("qwen-image", "z-image", "lumina2", *FLUX2):  # Euler goes on along the line to x0
            step = scheduler.sigmas[position + 1] / level
            expected = (following - step * x_t) / (1 - step)
        else:  # what the solver keeps of a step is its x0
            expected = scheduler.model_outputs[-1]
        torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)


def captured(network: nn.Module, call: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """The tensors that every evaluation of the network in `call` is given, and its output."""
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(("hidden_states",), args, strict=False)) | kwargs
        given |= given.pop("added_cond_kwargs", None) or {}
        seen.append(({key: value for key, value in given.items() if isinstance(value, Tensor)}, output[0]))

    handle = network.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        call()
    handle.remove()
    return seen


@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize("name", [name for name in TEXT_FAMILIES_DIT if name not in OWN_TEST])
def test_the_network_is_told_what_its_pipeline_tells_it(name: str, negative: str, folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(folders[name])
    qwen = name == "qwen-image"
    guided = {"true_cfg_scale": 3.0} if qwen else {"guidance_scale": 3.0}
    call = (
        call_of(name) | guided | {"num_inference_steps": 2, "negative_prompt": [negative] * 2, "output_type": "latent"}
    )
    seen = captured(pipeline.transformer, lambda: pipeline(PROMPTS, **call))
    (given, output), unconditional = seen[0], seen[1] if qwen else None
    with torch.no_grad():
        null = text_of(pipeline).encode_null(encoders(pipeline), negative, call["height"])
    told = TextCondition.concat([null.repeated(2), condition_of(pipeline, PROMPTS, call_of(name)["height"])])
    denoiser = denoiser_of(pipeline)
    assert {key: tuple(value.shape[1:]) for key, value in told.tensors.items()} == denoiser.text_shapes

    scale = pipeline.transformer.config.timestep_scale * 1000 if name.startswith("sana") else 1
    if unconditional is not None:
        half, (given_null, output_null) = len(PROMPTS), unconditional
        assert torch.equal(told["prompt_embeds_mask"][half:].bool(), mask_of(given, 512))
        assert torch.equal(told["prompt_embeds_mask"][:half].bool(), mask_of(given_null, 512))
        x_t, output = unpacked(given["hidden_states"]), unpacked(torch.cat([output_null, output]))
        for rows, embeds in ((slice(half), given_null), (slice(half, None), given)):
            length = embeds["encoder_hidden_states"].shape[1]
            torch.testing.assert_close(told["prompt_embeds"][rows, :length], embeds["encoder_hidden_states"])
        x_t, t = torch.cat([x_t, x_t]), given["timestep"].repeat(2)
    else:
        names = {"prompt_embeds": "encoder_hidden_states", "prompt_attention_mask": "encoder_attention_mask"}
        for key, argument in names.items():
            length = given[argument].shape[1]
            torch.testing.assert_close(told[key][:, :length], given[argument], rtol=1e-5, atol=1e-5)
            assert not told[key][:, length:].any()
        assert length == (120 if name == "pixart-alpha" else 300)
        if name == "pixart-alpha":
            for key in ("resolution", "aspect_ratio"):
                assert torch.equal(told[key], given[key])
            assert told["resolution"].unique().tolist() == [16.0]
        x_t, t, output = given["hidden_states"], given["timestep"] / scale, output[:, : denoiser.sample_shape[0]]
    with torch.no_grad():
        made = denoiser.predict(x_t, t.float(), told)[0].output
    torch.testing.assert_close(made, output, rtol=1e-4, atol=1e-5)
    assert (made[:2] - made[2:]).abs().mean() > 1e-3  # prompts matter


def mask_of(given: dict[str, Any], length: int) -> Tensor:
    embeds = given["encoder_hidden_states"]
    mask = given.get("encoder_hidden_states_mask", torch.ones(embeds.shape[:2])).bool()
    return nn.functional.pad(mask, (0, length - mask.shape[1]))


def test_sanas_instruction_stands_before_prompts_and_not_before_the_negative_one(folders: dict[str, Path]) -> None:
    alone = encoders(load_pipeline(folders["sana"]))
    with torch.no_grad():
        prompt = sana.encode_prompts(alone, [NEGATIVE], 32)
        null = sana.encode_negative(alone, NEGATIVE, 32)
    shared = int(null["prompt_attention_mask"].sum())
    assert torch.equal(prompt["prompt_attention_mask"], null["prompt_attention_mask"])  # the instruction is cut off
    assert not torch.allclose(prompt["prompt_embeds"][:, 1:shared], null["prompt_embeds"][:, 1:shared], atol=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_read_up_to_the_limit_of_its_tokenizer(name: str, folders: dict[str, Path]) -> None:
    alone = encoders(load_pipeline(folders[name]))
    text, tokenizer = text_of(alone), getattr(alone.tokenizer, "tokenizer", alone.tokenizer)
    before, whole = text.tokens_before(alone), text.tokenizers["tokenizer"]
    assert whole is not None
    limit, words = whole - before, "a"
    while len(tokenizer(words, add_special_tokens=not before).input_ids) < limit:
        words += " bold"
    assert len(tokenizer(words, add_special_tokens=not before).input_ids) == limit
    last = words.removesuffix("bold") + "thin"
    beyond = [words + " seven" * 9, words + " thin" * 9]
    with torch.no_grad():
        taken, other, *cut = (
            text.encode_prompts(alone, [prompt], 16)["prompt_embeds"] for prompt in (words, last, *beyond)
        )
    assert taken.shape[1] == (whole if name in OWN_TEST else limit)
    assert not torch.allclose(taken, other, atol=1e-3)
    torch.testing.assert_close(cut[0], cut[1], rtol=1e-5, atol=1e-5)
    listed = PromptEncoder(text, alone, 16).cut([words, *beyond])
    assert [(entry.index, entry.limit) for entry in listed] == [(1, limit), (2, limit)]


def test_padding_changes_nothing(folders: dict[str, Path]) -> None:
    for name in [name for name in (*FAMILIES, "pixart-alpha") if name not in FLUX2]:
        pipeline = load_pipeline(folders[name])
        denoiser, condition = denoiser_of(pipeline), condition_of(pipeline, PROMPTS, call_of(name)["height"])
        mask_name = next(key for key in condition.tensors if "mask" in key)
        x_t, t, _ = inputs(denoiser, 2)
        together = denoiser.predict(x_t, t, condition)[0].output
        for i in range(2):
            length = int(condition[mask_name][i].sum())
            alone = {
                key: value[i : i + 1, :length] if key in ("prompt_embeds", mask_name) else value[i : i + 1]
                for key, value in condition.tensors.items()
            }
            single = denoiser.predict(x_t[i : i + 1], t[i : i + 1], TextCondition(alone))[0].output
            torch.testing.assert_close(together[i : i + 1], single, rtol=1e-4, atol=1e-5)


def test_pixarts_variances_are_cut_off_and_nothing_else() -> None:
    whole, cut = pixart_transformer(), pixart_transformer()
    denoiser = pixart.wrap(cut, scheduler_config(DPMSolverMultistepScheduler()))
    assert cut.config.out_channels == 4
    x_t, t, condition = inputs(denoiser, 2)
    torch.testing.assert_close(
        denoiser.predict(x_t, t, condition)[0].output, own_output(whole, x_t, t, condition)[:, :4], rtol=1e-5, atol=1e-6
    )
    empty = pixart.wrap(pixart_transformer().to("meta"), scheduler_config(DPMSolverMultistepScheduler()))
    assert all(parameter.is_meta for parameter in empty.parameters())  # how large networks are counted


def test_pixart_as_it_was_first_published_is_read(tmp_path: Path) -> None:
    """Under the name of a class from before PixArtTransformer2DModel, with settings that it does not have."""
    transformer = pixart_transformer(sample_size=128)
    transformer.save_pretrained(tmp_path)
    older = Transformer2DModel.from_config(
        {key: value for key, value in transformer.config.items() if key != "use_additional_conditions"}
    )
    assert {key for key, _ in older.named_parameters()} == {key for key, _ in transformer.named_parameters()}
    config = {"_class_name": "Transformer2DModel", **{k: v for k, v in older.config.items() if not k.startswith("_")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded: Any = load_network(PixArtTransformer2DModel, tmp_path)
    x_t, t, condition = inputs(tiny("pixart-alpha"), 2)
    assert torch.equal(own_output(loaded.eval(), x_t, t, condition), own_output(transformer, x_t, t, condition))


@pytest.mark.parametrize("name", TEXT_FAMILIES_DIT)
def test_other_weights_are_read_alike(name: str) -> None:
    denoiser: Any = tiny(name)
    denoiser.resize(16, 16)
    other = denoiser.with_network(tiny(name).network)
    assert (other.sample_shape, other.feature_shapes) == (denoiser.sample_shape, denoiser.feature_shapes)
    assert other.kind == denoiser.kind
    x_t, t, condition = inputs(denoiser)
    assert torch.equal(other(x_t, t, condition), denoiser(x_t, t, condition))
    zeros = denoiser.example_condition(3, "cpu")
    assert denoiser(x_t, t, zeros).isfinite().all()
    with pytest.raises(ArgumentError, match="got None"):
        denoiser(x_t, t)


@pytest.mark.parametrize("name", TEXT_FAMILIES_DIT)
def test_a_network_in_bfloat16_takes_conditions_in_float32(name: str) -> None:
    denoiser = tiny(name)
    x_t, t, condition = inputs(denoiser)
    with torch.no_grad():
        full = denoiser.predict(x_t, t, condition)[0].output
        low = denoiser.bfloat16()
        output = low.predict(low.network_input(x_t, t), t, condition)[0].output
    assert output.dtype == (torch.float32 if name.startswith("pixart") else torch.bfloat16)  # eps: a wide last layer
    assert (output - full).norm() < 0.1 * full.norm()


def test_variants_that_are_not_supported_are_refused() -> None:
    flow, vp = scheduler_config(FlowMatchEulerDiscreteScheduler()), scheduler_config(DPMSolverMultistepScheduler())
    with pytest.raises(CheckpointError, match="Sana-Sprint"):
        sana.wrap(sana_transformer(guidance_embeds=True), flow)
    with pytest.raises(CheckpointError, match="8 input and 16 output channels"):
        sana.wrap(sana_transformer(out_channels=16), flow)
    with pytest.raises(CheckpointError, match="4 input and 6 output channels"):
        pixart.wrap(pixart_transformer(out_channels=6), vp)
    for name in FAMILIES:
        if name != "sana" and name not in FLUX2:  # whose patches are of one latent
            with pytest.raises(ArgumentError, match="latents of 7 x 8"):
                tiny(name).resize(7, 8)


@pytest.mark.skipif(not HAS_QWEN_IMAGE, reason="this version of diffusers has no Qwen-Image")
def test_variants_of_qwen_image_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, vp = scheduler_config(FlowMatchEulerDiscreteScheduler()), scheduler_config(DPMSolverMultistepScheduler())
    with pytest.raises(CheckpointError, match="expected a flow-matching scheduler"):
        qwen_image.wrap(qwen_transformer(), vp)
    with pytest.raises(CheckpointError, match="16 input and 8 output channels"):
        qwen_image.wrap(qwen_transformer(out_channels=8), flow)
    with pytest.raises(CheckpointError, match=r"guidance_embeds True: .*the text-to-image one.*expected False"):
        qwen_image.wrap(qwen_transformer(guidance_embeds=True), flow)
    with pytest.raises(CheckpointError, match="zero_cond_t True: of Qwen-Image"):
        qwen_image.wrap(qwen_transformer(zero_cond_t=True, use_additional_t_cond=True), flow)
    monkeypatch.setattr("diffusers.__version__", "0.36.0")
    with pytest.raises(CheckpointError, match=r"install diffusers 0\.37"):
        qwen_image.wrap(qwen_transformer(), flow)

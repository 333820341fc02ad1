from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as published
from torch import Tensor

from fdistill.adapters import original_layout
from fdistill.adapters.original_names import assemble
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.formats.comfy import NETWORK, single_file
from fdistill.formats.comfy.autoencoder import original_autoencoder
from fdistill.formats.comfy.text_encoders import original_clip, original_open_clip
from fdistill.formats.lora_file import LORA_FILE, kohya_names, save_lora
from fdistill.students.export import export_student
from support.text_families_dit import HAS_QWEN_IMAGE, HAS_Z_IMAGE
from support.text_families_flux2 import HAS_FLUX2
from support.tiny_stable_diffusion import (
    UNETS,
    adapted_unet,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
    unet_output,
)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", UNETS)
def test_diffusers_own_converter_takes_a_unet_back(kind: str) -> None:
    unet = tiny_unet(**UNETS[kind])
    state = unet.state_dict()
    layout = original_layout("UNet2DConditionModel", state, unet.config)
    made = {NETWORK + name: value for name, value in assemble(layout or {}, state).items()}
    same(published.convert_ldm_unet_checkpoint(made, unet.config), state)


def meta(cls: Any, **config: object) -> Any:
    with torch.device("meta"):
        return cls(**config)


SD_SIZES = {"block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32}
PUBLISHED_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("kind", PUBLISHED_UNETS)
def test_unets_of_the_published_sizes_have_the_published_names(kind: str) -> None:
    unet = meta(UNet2DConditionModel, **PUBLISHED_UNETS[kind])
    state = unet.state_dict()
    made = assemble(original_layout("UNet2DConditionModel", state, unet.config) or {}, state)
    back = published.convert_ldm_unet_checkpoint({NETWORK + k: v for k, v in made.items()}, unet.config)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    # By this name diffusers and others tell whole checkpoints of Stable Diffusion 1 and 2.
    second = "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    key = second if kind == "sd21" else "output_blocks.11.0.skip_connection.weight"
    assert (key in made) == (kind != "sdxl")
    upsampled = {name for name in made if name.endswith(".conv.weight") and name.startswith("output_blocks.")}
    if kind == "sdxl":
        assert upsampled == {"output_blocks.2.2.conv.weight", "output_blocks.5.2.conv.weight"}
    else:  # there is no attention at the coarsest resolution
        assert upsampled == {f"output_blocks.{place}.conv.weight" for place in ("2.1", "5.2", "8.2")}


def test_a_network_without_published_names_is_refused() -> None:
    unet = tiny_unet(time_cond_proj_dim=8)
    with pytest.raises(CheckpointError, match=r"time_embedding\.cond_proj\.weight"):
        original_layout("UNet2DConditionModel", unet.state_dict(), unet.config)
    with pytest.raises(CheckpointError, match="layers_per_block"):
        original_layout("UNet2DConditionModel", unet.state_dict(), {"layers_per_block": [1, 2]})
    assert original_layout("SanaTransformer2DModel", ["x"], {}) is None


def test_diffusers_own_converter_takes_an_autoencoder_back() -> None:
    vae = tiny_vae()
    state = vae.state_dict()
    made = original_autoencoder(state)
    assert made["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    back = published.convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in made.items()}, vae.config)
    same(back, state)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    same(original_autoencoder(renamed), made)


def test_diffusers_own_converters_take_text_encoders_back() -> None:
    first, second = tiny_text_encoder(16), tiny_text_encoder(24, projection=True, act="gelu")
    for model, prefix, make in (
        (first, "cond_stage_model.transformer.", original_clip),
        (second, "conditioner.embedders.1.model.", original_open_clip),
    ):
        state = model.state_dict()
        made = {prefix + name: value for name, value in make(state).items()}
        if make is original_clip:
            back = published.convert_ldm_clip_checkpoint(made)
        else:
            back = published.convert_open_clip_checkpoint(getattr(model, "text_model", model), made, prefix=prefix)
        same(
            {name.removeprefix("text_model."): value for name, value in back.items()},
            {name.removeprefix("text_model."): value for name, value in state.items()},
        )


SD3: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 4,
}
SD35 = SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
SD35_LARGE_TINY = SD3 | {"qk_norm": "rms_norm"}
SD35_MEDIUM = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD35_MEDIUM | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
SD35_LARGE |= {"pos_embed_max_size": 192, "dual_attention_layers": ()}
FLUX = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}


def original(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = original_layout(type(model).__name__, state, model.config)
    assert layout is not None
    return assemble(layout, state)


@pytest.mark.parametrize("config", [SD3, SD35, SD35_LARGE_TINY], ids=["sd3", "sd35-medium", "sd35-large"])
def test_diffusers_own_converter_takes_an_sd3_transformer_back(config: dict[str, Any]) -> None:
    model = SD3Transformer2DModel(**config)
    state = model.state_dict()
    made = {NETWORK + name: value for name, value in original(model, state).items()}
    same(published.convert_sd3_transformer_checkpoint_to_diffusers(made), state)


def test_diffusers_own_converter_takes_a_flux_transformer_back() -> None:
    model = meta(FluxTransformer2DModel, **FLUX)  # the converter knows the published width alone
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(len(value), *[1] * (value.ndim - 1), generator=generator)
        for name, value in model.state_dict().items()
    }
    made = original(model, state)
    assert made["single_blocks.1.linear1.weight"].shape == (7 * 3072, 1)
    assert "double_blocks.0.img_attn.norm.key_norm.scale" in made
    same(published.convert_flux_transformer_checkpoint_to_diffusers(made), state)


@pytest.mark.skipif(not HAS_FLUX2, reason="this diffusers has no FLUX.2")
def test_diffusers_own_converter_takes_a_flux_2_transformer_back() -> None:
    from fdistill.adapters.flux2 import FAMILY, tiny_transformer

    model = tiny_transformer(guidance_embeds=True)
    state = model.state_dict()
    made = original(model, state)
    shapes = {name: tuple(value.shape) for name, value in made.items()}
    assert [kind for kind, known in FAMILY.single_files.items() if known(shapes)] == ["FLUX.2"]
    same(published.convert_flux2_transformer_checkpoint_to_diffusers(dict(made)), state)


@pytest.mark.parametrize(
    ("cls", "config", "back"),
    [
        (SD3Transformer2DModel, SD35_MEDIUM, published.convert_sd3_transformer_checkpoint_to_diffusers),
        (SD3Transformer2DModel, SD35_LARGE, published.convert_sd3_transformer_checkpoint_to_diffusers),
        (
            FluxTransformer2DModel,
            {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
            published.convert_flux_transformer_checkpoint_to_diffusers,
        ),
    ],
    ids=["sd35-medium", "sd35-large", "flux-dev"],
)
def test_transformers_of_the_published_sizes_have_the_published_names(
    cls: Any, config: dict[str, Any], back: Callable[..., dict[str, Tensor]]
) -> None:
    model = meta(cls, **config)
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    found = back(original(model, state))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in state.items()}


def test_pixart_has_the_names_of_its_publisher() -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=12,
        use_additional_conditions=True,
    )
    state = model.state_dict()
    made = original(model, state)
    # scripts/convert_pixart_sigma_to_diffusers.py of diffusers, read the other way round
    assert torch.equal(made["x_embedder.proj.weight"], state["pos_embed.proj.weight"])
    assert torch.equal(made["t_block.1.bias"], state["adaln_single.linear.bias"])
    assert torch.equal(made["ar_embedder.mlp.2.bias"], state["adaln_single.emb.aspect_ratio_embedder.linear_2.bias"])
    assert torch.equal(made["y_embedder.y_proj.fc2.weight"], state["caption_projection.linear_2.weight"])
    assert torch.equal(made["final_layer.scale_shift_table"], state["scale_shift_table"])
    block = "transformer_blocks.1"
    for i, part in enumerate("qkv"):
        rows = made["blocks.1.attn.qkv.weight"].chunk(3)[i]
        assert torch.equal(rows, state[f"{block}.attn1.to_{part}.weight"])
    assert torch.equal(made["blocks.1.cross_attn.q_linear.weight"], state[f"{block}.attn2.to_q.weight"])
    for i, part in enumerate("kv"):
        rows = made["blocks.1.cross_attn.kv_linear.bias"].chunk(2)[i]
        assert torch.equal(rows, state[f"{block}.attn2.to_{part}.bias"])
    assert torch.equal(made["blocks.0.mlp.fc1.weight"], state["transformer_blocks.0.ff.net.0.proj.weight"])
    assert sum(value.numel() for value in made.values()) == sum(value.numel() for value in state.values())


@pytest.mark.skipif(not HAS_QWEN_IMAGE, reason="this diffusers has no Qwen-Image")
def test_qwen_image_keeps_its_names() -> None:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    same(original(model, model.state_dict()), dict(model.state_dict()))


@pytest.mark.skipif(not HAS_Z_IMAGE, reason="this diffusers has no Z-Image")
def test_diffusers_own_converter_takes_a_z_image_transformer_back() -> None:
    from fdistill.adapters.z_image import tiny_transformer

    model = tiny_transformer()
    state = model.state_dict()
    made = {NETWORK + name: value for name, value in original(model, state).items()}
    assert made[f"{NETWORK}layers.0.attention.qkv.weight"].shape == (72, 24)
    assert made.keys() >= {f"{NETWORK}x_embedder.weight", f"{NETWORK}final_layer.adaLN_modulation.1.bias"}
    same(published.convert_z_image_transformer_checkpoint_to_diffusers(made), state)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_v_predictions_are_marked_or_spoken_of(kind: str, tmp_path: Path) -> None:
    folder = tiny_pipeline(kind, tmp_path / kind)
    made, notes = single_file(folder)
    assert "v_pred" not in made
    assert notes == ["ComfyUI recognises only the published sizes of this UNet, and will not recognise this one"]
    scheduler = DDIMScheduler(
        steps_offset=1, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler.save_pretrained(folder / "scheduler")
    made, notes = single_file(folder)
    assert ("v_pred" in made, "ztsnr" in made) == ((True, True) if kind == "xl" else (False, False))
    assert any("ModelSamplingDiscrete" in note for note in notes) == (kind != "xl")
    DDIMScheduler(steps_offset=1, prediction_type="sample").save_pretrained(folder / "scheduler")
    with pytest.raises(CheckpointError, match="'sample'"):
        single_file(folder)


def test_latents_that_comfyui_would_decode_otherwise_are_spoken_of(tmp_path: Path) -> None:
    folder = tiny_pipeline("xl", tmp_path / "xl")
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    for changes, said in (
        ({"scaling_factor": 0.5}, r"of scaling_factor 0\.13025, but this student's have scaling_factor 0\.5: decode"),
        ({"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}, r"scaling_factor 0\.13025, latents_mean \[1\.0"),
    ):
        path.write_text(json.dumps(config | changes))
        assert any(re.search(said, note) for note in single_file(folder)[1])


@pytest.mark.parametrize("kind", ["sd1", "xl"])
@pytest.mark.parametrize("naming", ["lora", "comfy-lora"])
def test_diffusers_loads_a_students_lora(kind: str, naming: str, tmp_path: Path) -> None:
    folder = tiny_pipeline(kind, tmp_path / kind)
    adapted = adapted_unet(folder)
    save_lora(adapted, folder / LORA_FILE, "unet")
    assert export_student(folder, naming, tmp_path / "x" / LORA_FILE) == []
    pipeline = DiffusionPipeline.from_pretrained(folder)
    before = unet_output(pipeline.unet)
    pipeline.load_lora_weights(tmp_path / "x", weight_name=LORA_FILE)
    expected = unet_output(adapted)
    assert (before - expected).abs().max() > 0.01
    torch.testing.assert_close(unet_output(pipeline.unet), expected, rtol=1e-5, atol=1e-5)


def test_kohya_names_are_those_that_comfyui_looks_for(tmp_path: Path) -> None:
    tensors = {"unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight": torch.ones(4, 8)}
    made = kohya_names(tensors)
    layer = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert set(made) == {f"{layer}.lora_down.weight", f"{layer}.alpha"}
    assert made[f"{layer}.alpha"] == 4
    with pytest.raises(CheckpointError, match="transformer"):
        kohya_names({"transformer.x.lora_A.weight": torch.ones(1)})


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    folder = tiny_pipeline("sd1", tmp_path / "student")
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=r"all its weights were trained.*--format comfy"):
        export_student(folder, "lora", out)
    with pytest.raises(ArgumentError, match="lora, comfy"):
        export_student(folder, "onnx", out)
    with pytest.raises(ArgumentError, match="fp16"):
        export_student(folder, "comfy", out, "int8")
    with pytest.raises(ArgumentError, match=r"\.safetensors"):
        export_student(folder, "comfy", tmp_path / "out.ckpt")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        export_student(tmp_path, "comfy", out)
    with pytest.raises(ArgumentError, match="'student'"):
        save_lora(tiny_unet(), out, "unet")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cut short"):
        export_student(folder, "comfy", out)
    assert not out.exists()

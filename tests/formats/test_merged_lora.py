from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdistill.adapters.flux import tiny_arguments
from fdistill.base.errors import CheckpointError
from fdistill.formats.lora_file import LORA_FILE, kohya_names, save_lora
from fdistill.formats.merged_lora import merged_folder
from fdistill.formats.pipeline_folder import read_weights
from support.text_families_dit import pixart
from support.tiny_stable_diffusion import adapted_unet, sd3_base, tiny_pipeline, tiny_unet

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.1.mlp.fc1"


def matrices(rank: int, out: int, inputs: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)


def write(path: Path, tensors: dict[str, Tensor], **settings: object) -> Path:
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    save_file({name: value.clone() for name, value in tensors.items()}, path, metadata)
    return path


def close(found: Tensor, expected: Tensor) -> None:
    """A few roundings of float32, each of a number no larger than the largest weight."""
    rounding = 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rounding)


NAMINGS = {
    "diffusers": (f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight", f"unet.{QUERY}.alpha"),
    "peft": (f"{QUERY}.lora_A.default.weight", f"{QUERY}.lora_B.default.weight", f"{QUERY}.alpha"),
    "kohya": tuple(
        f"lora_unet_{QUERY.replace('.', '_')}{leaf}" for leaf in (".lora_down.weight", ".lora_up.weight", ".alpha")
    ),
    "ldm": tuple(
        f"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q{leaf}"
        for leaf in (".lora_down.weight", ".lora_up.weight", ".alpha")
    ),
    "processors": tuple(
        f"unet.{QUERY.replace('attn1.', 'attn1.processor.')}_lora.{leaf}.weight" for leaf in ("down", "up")
    ),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_merged_weights_are_w_plus_scaled_b_a(naming: str, tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    down, up = matrices(2, 8, 8)
    tensors = dict(zip(NAMINGS[naming], (down, up, torch.tensor(3.0)), strict=False))
    alpha = 3.0 if len(tensors) == 3 else 2.0
    folder = merged_folder(base, write(tmp_path / "lora.safetensors", tensors), scale=0.7)
    before, after = read_weights(base / "unet"), read_weights(folder / "unet")
    expected = before[f"{QUERY}.weight"].double() + 0.7 * alpha / 2 * up.double() @ down.double()
    assert (after[f"{QUERY}.weight"] - before[f"{QUERY}.weight"]).abs().max() > 0.1
    close(after[f"{QUERY}.weight"], expected)
    assert all(torch.equal(before[name], after[name]) for name in before if name != f"{QUERY}.weight")
    for part in ("vae", "text_encoder"):
        first, second = read_weights(base / part), read_weights(folder / part)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_alpha_from_the_settings_that_diffusers_writes(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    down, up = matrices(2, 8, 8)
    key = QUERY.replace("to_q", "to_k")
    tensors = {
        f"unet.{layer}.lora_{matrix}.weight": value.clone()
        for layer in (QUERY, key)
        for matrix, value in (("A", down), ("B", up))
    }
    settings = {"unet.lora_alpha": 6, "unet.r": 2, "unet.alpha_pattern": {"attn1.to_k": 5}}
    before = read_weights(base / "unet")
    for rooted in (False, True):
        lora = write(tmp_path / "lora.safetensors", tensors, **settings, **{"unet.use_rslora": rooted})
        after = read_weights(merged_folder(base, lora) / "unet")
        for layer, alpha in ((QUERY, 6), (key, 5)):
            scale = alpha / (2**0.5 if rooted else 2)
            expected = before[f"{layer}.weight"].double() + scale * up.double() @ down.double()
            close(after[f"{layer}.weight"], expected)


@pytest.mark.parametrize("kind", ["sd1", "xl"])
@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_merging_is_what_diffusers_own_fusing_gives(kind: str, naming: str, tmp_path: Path) -> None:
    base = tiny_pipeline(kind, tmp_path / "base")
    save_lora(adapted_unet(base), tmp_path / LORA_FILE, "unet")
    tensors = load_file(tmp_path / LORA_FILE)
    encoders = {"text_encoder": 16} | ({"text_encoder_2": 24} if kind == "xl" else {})
    if naming == "kohya":
        tensors = kohya_names(tensors)
        for prefix, width in zip(("lora_te1_", "lora_te2_"), encoders.values(), strict=False):
            down, up = matrices(4, 2 * width, width)
            name = prefix + TEXT.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    else:
        for part, width in encoders.items():
            down, up = matrices(4, width, width)
            name = f"{part}.text_model.encoder.layers.1.self_attn.q_proj"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    write(tmp_path / LORA_FILE, tensors)
    merged = DiffusionPipeline.from_pretrained(merged_folder(base, tmp_path / LORA_FILE, scale=0.5))
    fused, plain = DiffusionPipeline.from_pretrained(base), DiffusionPipeline.from_pretrained(base)
    fused.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    fused.fuse_lora(components=["unet", *encoders], lora_scale=0.5)
    fused.unload_lora_weights()
    for part in ("unet", *encoders):
        before, expected, found = (getattr(pipeline, part).state_dict() for pipeline in (plain, fused, merged))
        assert all(torch.allclose(expected[name], found[name], rtol=1e-5, atol=1e-6) for name in expected), part
        assert max((before[name] - found[name]).abs().max() for name in before) > 0.1


def test_publishers_names_reach_the_parts_they_hold(tmp_path: Path) -> None:
    base, network = sd3_base(tmp_path / "base")
    qkv, out = matrices(2, 48, 16), matrices(2, 32, 16, seed=4)
    pairs = {"joint_blocks.0.x_block.attn.qkv": qkv, "final_layer.adaLN_modulation.1": out}
    tensors = {
        f"lora_unet_{name.replace('.', '_')}.lora_{matrix}.weight": value
        for name, (down, up) in pairs.items()
        for matrix, value in (("down", down), ("up", up))
    }
    folder = merged_folder(base, write(tmp_path / "lora.safetensors", tensors))
    after, before = read_weights(folder / "transformer"), network.state_dict()
    for i, part in enumerate("qkv"):
        name = f"transformer_blocks.0.attn.to_{part}.weight"
        close(after[name], before[name].double() + (qkv[1].double() @ qkv[0].double())[16 * i : 16 * (i + 1)])
    shift, scale = (out[1].double() @ out[0].double()).chunk(2)
    name = "norm_out.linear.weight"  # scale comes first in diffusers
    close(after[name], before[name].double() + torch.cat([scale, shift]))
    SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")


def test_shards_and_half_precision(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    pipeline = DiffusionPipeline.from_pretrained(base).to(torch.float16)
    pipeline.save_pretrained(base, max_shard_size="20KB")
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert len(list((base / "unet").glob("*.safetensors"))) > 2
    down, up = matrices(2, 8, 8)
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    original = {path: path.read_bytes() for path in base.rglob("*.safetensors")}
    folder = merged_folder(base, write(tmp_path / "lora.safetensors", tensors))
    assert all(path.read_bytes() == content for path, content in original.items())
    weight = read_weights(base / "unet")[f"{QUERY}.weight"]
    merged = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).unet.state_dict()[f"{QUERY}.weight"]
    assert torch.equal(merged, (weight.float() + up @ down).half())
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"x": "../x"}}')
    with pytest.raises(CheckpointError, match=r"expected file names under weight_map, got \['\.\./x'\]"):
        read_weights(base / "unet")


def test_a_network_of_its_own_kind_and_weights_of_another_variant(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    tiny_unet(time_cond_proj_dim=8).save_pretrained(base / "unet")
    half = base / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes((base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    down, up = matrices(2, 8, 8)
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    folder = merged_folder(base, write(tmp_path / "lora.safetensors", tensors))
    before, after = read_weights(base / "unet"), read_weights(folder / "unet")
    close(after[f"{QUERY}.weight"], before[f"{QUERY}.weight"].double() + up.double() @ down.double())
    assert not (folder / "unet" / half.name).exists()


def test_the_folder_depends_on_pipeline_lora_and_scale(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    down, up = matrices(2, 8, 8)
    lora = tmp_path / "lora.safetensors"

    def merged(factor: float, scale: float) -> Path:
        write(lora, {f"unet.{QUERY}.lora_A.weight": factor * down, f"unet.{QUERY}.lora_B.weight": up})
        return merged_folder(base, lora, scale)

    first = merged(1.0, 1.0)
    assert merged(1.0, 1.0) == first
    folders = {first, merged(1.0, 0.5), merged(2.0, 1.0)}
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler", "steps_offset": 1}')
    folders.add(merged(1.0, 1.0))
    assert len(folders) == 4


def test_a_lora_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    lora = tmp_path / "lora.safetensors"

    def refused(match: str, tensors: dict[str, Tensor], **settings: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            merged_folder(base, write(lora, tensors, **settings))

    down, up = matrices(2, 8, 8)
    good = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    far = {f"unet.mid_block.attentions.7.to_q.lora_{m}.weight": v for m, v in (("A", down), ("B", up))}
    refused(r"1 of 2 layers are not in .*'unet\.mid_block\.attentions\.7\.to_q'.*another base", good | far)
    second = {f"lora_te2_{TEXT.replace('.', '_')}.lora_{m}.weight": v for m, v in (("down", down), ("up", up))}
    refused("1 of 1 layers", second)
    wide, tall = matrices(2, 8, 16)
    refused(r"for a weight of 8 x 16, but unet's is of 8 x 8", dict(zip(good, (wide, tall), strict=True)))
    refused(r"expected down \[rank, in\]", {f"unet.{QUERY}.lora_A.weight": down})
    refused(r"expected down \[rank, in\]", good | {f"unet.{QUERY}.lora_B.weight": up[:, :1].contiguous()})
    refused("not of a plain LoRA", good | {f"unet.{QUERY}.dora_scale": up})
    refused("unet with use_dora True: a DoRA cannot be merged", good, **{"unet.use_dora": True})
    refused("unet with init_lora_weights 'pissa'", good, **{"unet.init_lora_weights": "pissa", "unet.r": 2})
    refused("holds no LoRA layers", {f"unet.{QUERY}.alpha": torch.tensor(1.0)})
    lora.write_bytes(lora.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        merged_folder(base, lora)
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        merged_folder(base, tmp_path / "lora.bin")
    write(lora, good)
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        merged_folder(tmp_path, lora)


@pytest.mark.parametrize("number", [1, 3])
def test_kohyas_text_encoders_of_flux_are_found_by_what_they_are(number: int, tmp_path: Path) -> None:
    """kohya's third text encoder is T5, which is `text_encoder_2` of FLUX and `text_encoder_3` of SD3."""
    base = tmp_path / "base"
    FluxPipeline(**tiny_arguments({})).save_pretrained(base)
    layer, component = {
        1: ("text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        3: ("encoder.block.0.layer.0.SelfAttention.q", "text_encoder_2"),
    }[number]
    place = f"lora_te{number}_{layer.replace('.', '_')}"
    before = read_weights(base / component)
    name = next(key for key in before if f"text_model.{key}".endswith(f"{layer}.weight"))
    down, up = matrices(2, *before[name].shape)
    pair = {f"{place}.lora_down.weight": down, f"{place}.lora_up.weight": up}
    after = read_weights(merged_folder(base, write(tmp_path / "lora.safetensors", pair)) / component)
    for key, weight in before.items():
        close(after[key], weight.double() + (up.double() @ down.double() if key == name else 0))
    other = {key.replace(f"te{number}", "te4"): value for key, value in pair.items()}
    wrong = write(tmp_path / "wrong.safetensors", other)
    with pytest.raises(CheckpointError, match="another base model"):
        merged_folder(base, wrong)


def saved_by_peft(network: Any, folder: Path, **settings: Any) -> Any:
    """Adapters as peft saves them, with random weights; returns the network with them merged by peft."""
    torch.manual_seed(1)
    adapted: Any = get_peft_model(network, LoraConfig(r=4, target_modules=["to_q", "to_v"], **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 16},
    "patterns": {"lora_alpha": 16, "alpha_pattern": {"attn1.to_q": 3}, "rank_pattern": {"attn2.to_q": 2}},
    "rank-stabilised": {"lora_alpha": 16, "use_rslora": True},
}


@pytest.mark.parametrize("settings", PEFT_SETTINGS)
@pytest.mark.parametrize("kind", ["sd1", "pixart"])
def test_adapters_as_peft_saves_them_are_merged_as_peft_merges_them(kind: str, settings: str, tmp_path: Path) -> None:
    if kind == "pixart":
        base, part, cls = pixart(tmp_path / "base"), "transformer", PixArtTransformer2DModel
    else:
        base, part, cls = tiny_pipeline("sd1", tmp_path / "base"), "unet", UNet2DConditionModel
    network = cls.from_pretrained(base / part)
    expected = saved_by_peft(network, tmp_path / "lora", **PEFT_SETTINGS[settings]).state_dict()
    before = read_weights(base / part)
    for lora in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        found = read_weights(merged_folder(base, lora) / part)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
        assert max((before[name] - found[name]).abs().max() for name in before) > 0.1


def test_a_folder_that_diffusers_saved_a_lora_to_is_taken(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    down, up = matrices(2, 8, 8)
    (tmp_path / "lora").mkdir()
    file = write(tmp_path / "lora" / LORA_FILE, dict(zip(NAMINGS["diffusers"], (down, up), strict=False)))
    assert merged_folder(base, tmp_path / "lora") == merged_folder(base, file)
    write(tmp_path / "lora" / "other.safetensors", {"x": down})
    with pytest.raises(CheckpointError, match=r"holds the safetensors other\.safetensors, pytorch_lora.*name the file"):
        merged_folder(base, tmp_path / "lora")


def test_more_than_a_plain_lora_is_refused_by_its_config(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1", tmp_path / "base")
    saved_by_peft(UNet2DConditionModel.from_pretrained(base / "unet"), tmp_path / "lora", lora_alpha=16)
    config = tmp_path / "lora" / "adapter_config.json"
    written = json.loads(config.read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora True: a DoRA cannot be merged.*expected False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'.*expected 'LORA'"),
        ({"new_kind_of_it": 3}, "does not know the field"),
        ({"lora_alpha": "many"}, "expected numbers"),
    ):
        config.write_text(json.dumps(written | change))
        with pytest.raises(CheckpointError, match=message):
            merged_folder(base, tmp_path / "lora")
    config.write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: cannot be read"):
        merged_folder(base, tmp_path / "lora")
    config.unlink()
    with pytest.raises(CheckpointError, match="is not beside it; copy it there"):
        merged_folder(base, tmp_path / "lora")

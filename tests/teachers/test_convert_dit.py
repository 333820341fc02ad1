"""State dicts of DiT and SiT, converted."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fdistill.adapters.checkpoint import load_teacher
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.teachers.convert import convert
from fdistill.teachers.convert_dit import Given

WEIGHTS = "diffusion_pytorch_model.safetensors"
WIDTH, HEADS, DEPTH, PATCH, CHANNELS, SIZE, CLASSES = 384, 6, 2, 2, 4, 8, 5


def dit_tensors(out_channels: int = 2 * CHANNELS) -> OrderedDict[str, Tensor]:
    """A state dict with the published names, every tensor random but the position embedding."""
    generator = torch.Generator().manual_seed(0)
    tensors: OrderedDict[str, Tensor] = OrderedDict()

    def linear(name: str, outputs: int, *inputs: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(outputs, *inputs, generator=generator) / math.sqrt(math.prod(inputs))
        tensors[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.3

    tensors["pos_embed"] = sines_and_cosines()
    linear("x_embedder.proj", WIDTH, CHANNELS, PATCH, PATCH)
    linear("t_embedder.mlp.0", WIDTH, 256)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    tensors["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH, generator=generator)
    for i in range(DEPTH):
        linear(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        linear(f"blocks.{i}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"blocks.{i}.mlp.fc2", WIDTH, 4 * WIDTH)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    linear("final_layer.linear", PATCH**2 * out_channels, WIDTH)
    return tensors


def sines_and_cosines() -> Tensor:
    """[1, T, WIDTH]: a quarter each of sin and cos of the column, sin and cos of the row."""
    grid = SIZE // PATCH
    table = torch.empty(grid, grid, WIDTH)
    for row in range(grid):
        for column in range(grid):
            for k in range(WIDTH // 4):
                frequency = 10000 ** (-k / (WIDTH // 4))
                angles = column * frequency, column * frequency, row * frequency, row * frequency
                for quarter, (wave, angle) in enumerate(zip((math.sin, math.cos) * 2, angles, strict=True)):
                    value = wave(angle)
                    table[row, column, quarter * (WIDTH // 4) + k] = value
    return table.reshape(1, grid * grid, WIDTH)


def plain_dit(tensors: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """DiT with adaLN-Zero blocks as in section 3.2 and figure 3 of arXiv 2212.09748, in float64.

    x [B, C, H, W], t [B], labels [B] -> [B, out_channels, H, W].
    """
    p = {name: value.double() for name, value in tensors.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.weight"].flatten(1).T + p[f"{name}.bias"]

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        normal = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return normal * (1 + scale[:, None]) + shift[:, None]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    def gelu(value: Tensor) -> Tensor:
        return value / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    batch, grid = x.shape[0], SIZE // PATCH
    patches = x.double().reshape(batch, CHANNELS, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5)
    hidden = linear("x_embedder.proj", patches.reshape(batch, grid * grid, -1)) + p["pos_embed"]

    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    condition = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    condition = condition + p["y_embedder.embedding_table.weight"][labels]

    for i in range(DEPTH):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", silu(condition)).split(
            WIDTH, dim=1
        )
        mixed = linear(f"{name}.attn.qkv", modulated(hidden, shift1, scale1))
        q, k, v = mixed.reshape(batch, grid * grid, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), dim=-1) @ v
        attention = attention.transpose(1, 2).reshape(batch, grid * grid, WIDTH)
        hidden = hidden + gate1[:, None] * linear(f"{name}.attn.proj", attention)
        inner = gelu(linear(f"{name}.mlp.fc1", modulated(hidden, shift2, scale2)))
        hidden = hidden + gate2[:, None] * linear(f"{name}.mlp.fc2", inner)

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(condition)).split(WIDTH, dim=1)
    pixels = linear("final_layer.linear", modulated(hidden, shift, scale))
    pixels = pixels.reshape(batch, grid, grid, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(batch, -1, SIZE, SIZE)


def with_its_frequencies(folder: Path) -> Any:
    """The converted transformer, told the time as the scheduler's config says."""
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    for module in transformer.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = config["downscale_freq_shift"]
    return transformer


@pytest.mark.parametrize(("family", "out_channels"), [("dit", 8), ("dit", 4), ("sit", 8)])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_converted_transformer_computes_dit(family: str, out_channels: int, suffix: str, tmp_path: Path) -> None:
    tensors = dit_tensors(out_channels)
    source = tmp_path / f"model.{suffix}"
    torch.save(tensors, source) if suffix == "pt" else save_file(dict(tensors), source)
    folder = convert(source, tmp_path / "teacher", family, given=Given(CLASSES))
    assert {path.name for path in folder.iterdir()} == {"transformer", "scheduler", "README.md"}

    x, labels = torch.randn(4, CHANNELS, SIZE, SIZE), torch.tensor([0, 3, CLASSES - 1, CLASSES])
    t = torch.tensor([0.0, 17.0, 431.0, 999.0]) if family == "dit" else torch.tensor([0.0, 0.2, 0.77, 1.0])
    expected = plain_dit(tensors, x, t, labels)
    with torch.no_grad():
        found = with_its_frequencies(folder)(x, t, labels).sample
    assert found.shape == (4, out_channels, SIZE, SIZE)
    assert expected.abs().mean() > 0.3
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    teacher = load_teacher(folder)
    levels = t if family == "dit" else 1 - t  # ours count from data to noise
    raw, _ = teacher.run(x, levels, labels, (), output=True, output_grad=True)
    assert raw is not None
    wanted = expected[:, :CHANNELS]
    torch.testing.assert_close(raw.double(), wanted, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if family == "dit":
        assert scheduler["_class_name"] == "DDIMScheduler"
        assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"]) == (1e-4, 0.02, "linear")
        assert (scheduler["num_train_timesteps"], scheduler["prediction_type"]) == (1000, "epsilon")
        assert scheduler["clip_sample"] is False
        assert "time_convention" not in scheduler
    else:
        assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
        assert scheduler["time_convention"] == "sit"
    assert "vae/" in (folder / "README.md").read_text()


def test_diffusers_own_frequencies_are_not_dits(tmp_path: Path) -> None:
    """The reason for `downscale_freq_shift` in the scheduler's config."""
    tensors = dit_tensors()
    torch.save(tensors, tmp_path / "DiT.pt")
    folder = convert(tmp_path / "DiT.pt", tmp_path / "teacher", "dit", given=Given(CLASSES))
    x, t, labels = torch.randn(1, CHANNELS, SIZE, SIZE), torch.tensor([431.0]), torch.tensor([3])
    with torch.no_grad():
        found = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()(x, t, labels).sample
    expected = plain_dit(tensors, x, t, labels)
    assert (found - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("key", ["ema", "model"])
def test_training_checkpoints_of_dit_are_read(key: str, tmp_path: Path) -> None:
    tensors = dit_tensors()
    zeros = {name: torch.zeros_like(value) for name, value in tensors.items()}
    content = {"model": zeros, "opt": {"state": {}}, "args": argparse.Namespace(epochs=3)} | {key: tensors}
    torch.save(content, tmp_path / "0400000.pt")
    folder = convert(tmp_path / "0400000.pt", tmp_path / "teacher", "sit", given=Given(CLASSES))
    saved_tensors = load_file(folder / "transformer" / WEIGHTS)
    assert torch.equal(saved_tensors["proj_out_2.weight"], tensors["final_layer.linear.weight"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_a_compiled_or_data_parallel_dit_are_read(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name: value for name, value in dit_tensors().items()}
    for name, save in (("DiT.pt", torch.save), ("DiT.safetensors", save_file)):
        save(tensors, tmp_path / name)
        folder = convert(tmp_path / name, tmp_path / f"{name}-teacher", "sit", given=Given(CLASSES))
        saved_tensors = load_file(folder / "transformer" / WEIGHTS)
        assert torch.equal(saved_tensors["proj_out_2.weight"], tensors[f"{prefix}final_layer.linear.weight"])


def test_what_training_was_started_with_is_read(tmp_path: Path) -> None:
    """DiT's and SiT's training scripts store their command line beside the weights."""
    path = tmp_path / "0400000.pt"

    def converted(family: str, given: Given, **arguments: Any) -> Path:
        torch.save({"ema": dit_tensors(), "args": argparse.Namespace(**arguments)}, path)
        return convert(path, tmp_path / "teacher", family, given=given)

    folder = converted("sit", Given(), model="SiT-S/2", num_classes=CLASSES, path_type="Linear", prediction="velocity")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["num_embeds_ada_norm"] == CLASSES
    shutil.rmtree(folder)
    for error, message, family, given, arguments in (
        (
            ArgumentError,
            "got 'dit', but .* says that it is SiT-S/2; expected 'sit'",
            "dit",
            Given(),
            {"model": "SiT-S/2"},
        ),
        (CheckpointError, "path_type 'GVP'; only networks of path_type 'Linear'", "sit", Given(), {"path_type": "GVP"}),
        (CheckpointError, "trained with prediction 'noise'", "sit", Given(), {"prediction": "noise"}),
        (ArgumentError, "num_classes: got 6, but .* says 5", "sit", Given(CLASSES + 1), {"num_classes": CLASSES}),
    ):
        with pytest.raises(error, match=message):
            converted(family, given, **arguments)


def test_other_state_dicts_are_refused(tmp_path: Path) -> None:
    def refused(content: Any, message: str) -> None:
        torch.save(content, tmp_path / "DiT.pt")
        with pytest.raises((CheckpointError, ArgumentError), match=message):
            convert(tmp_path / "DiT.pt", tmp_path / "teacher", "dit", given=Given(CLASSES))
        assert not (tmp_path / "teacher").exists()

    tensors = dit_tensors()
    refused([1], "holds no state dict")
    refused({"epoch": 3}, "holds no state dict")
    refused({}, "holds no state dict")
    refused({"x": torch.zeros(1)}, r"no tensor x_embedder\.proj\.weight of 4 dimensions")
    refused(nn.Linear(2, 2).state_dict(), r"no tensor x_embedder\.proj\.weight")
    refused({name: value for name, value in tensors.items() if name != "pos_embed"}, "no tensor pos_embed")
    refused(
        {k: v for k, v in tensors.items() if "blocks.1.mlp.fc1.b" not in k}, r"blocks\.1\.mlp\.fc1\.bias is missing"
    )
    refused(tensors | {"blocks.0.attn.q_norm.weight": torch.ones(2)}, r"q_norm\.weight has no place in a DiT or SiT")
    refused(tensors | {"blocks.1.mlp.fc1.bias": torch.ones(2)}, "has shape")
    refused(
        tensors | {"x_embedder.proj.weight": torch.ones(400, 4, 2, 2)}, "heads: .* has width 400, none of the published"
    )
    refused(tensors | {"pos_embed": torch.randn(1, 16, WIDTH)}, "pos_embed is not the fixed sines")
    swapped = tensors["pos_embed"].reshape(1, 4, 4, WIDTH).transpose(1, 2).reshape(1, 16, WIDTH)
    refused(tensors | {"pos_embed": swapped}, "pos_embed is not the fixed sines")
    (tmp_path / "DiT.safetensors").write_bytes(pickle.dumps(tensors)[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(tmp_path / "DiT.safetensors", tmp_path / "teacher", "dit")


def test_what_tensors_do_not_say_of_a_dit(tmp_path: Path) -> None:
    """The number of heads of an unpublished width, and whether the last row of the labels means "no class"."""
    tensors = dit_tensors()
    torch.save(tensors, tmp_path / "DiT.pt")

    def converted(name: str, **given: int) -> Any:
        return load_teacher(convert(tmp_path / "DiT.pt", tmp_path / name, "dit", given=Given(**given)))

    with pytest.raises(ArgumentError, match=r"num_classes: got None, but .* has 6 rows; expected 5, if .* or 6, if"):
        converted("unsaid")
    with pytest.raises(ArgumentError, match="num_classes: got 7"):
        converted("seven", num_classes=7)
    with pytest.raises(ArgumentError, match=r"heads: got 5, but .* has width 384"):
        converted("five", num_classes=5, heads=5)
    dropout, plain = converted("dropout", num_classes=5), converted("plain", num_classes=6)
    assert (dropout.num_classes, dropout.null_class) == (5, 5)
    assert (plain.num_classes, plain.null_class) == (6, None)
    last = torch.tensor([5])
    x, t = torch.randn(1, CHANNELS, SIZE, SIZE), torch.tensor([431.0])
    expected = plain_dit(tensors, x, t, last)[:, :CHANNELS]
    found, _ = plain.run(x, t, last, (), output=True, output_grad=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert converted("heads", num_classes=5, heads=12).network.config.num_attention_heads == 12
    with pytest.raises(ArgumentError, match="num_classes: got 5 for a pickle"):
        convert(tmp_path / "network.pkl", tmp_path / "out", given=Given(5))


def test_a_transformer_that_fastgen_saved_is_the_same_network(tmp_path: Path) -> None:
    """Its names are its own, and it estimates its own uncertainty."""
    tensors = dit_tensors(CHANNELS)
    theirs = {
        name.replace("final_layer.adaLN_modulation", "final_layer.adaptive_params")
        .replace("final_layer.linear", "final_layer.projection")
        .replace("y_embedder.embedding_table", "y_embedder.class_embeddings")
        .replace("t_embedder.mlp", "t_embedder.proj_net")
        .replace(".adaLN_modulation.", ".conditioning_net.")
        .replace(".attn.", ".attention.")
        .replace(".mlp.", ".feed_forward."): value
        for name, value in tensors.items()
    }
    assert len(theirs.keys() & tensors.keys()) < 6
    theirs |= {"logvar_linear.weight": torch.zeros(1, WIDTH), "logvar_linear.bias": torch.zeros(1)}
    torch.save({"model": {"net": theirs}, "iteration": 1}, tmp_path / "0001000.pth")
    torch.save(tensors, tmp_path / "SiT.pt")
    folders = [
        convert(tmp_path / name, tmp_path / name.split(".")[0], "sit", given=Given(CLASSES))
        for name in ("0001000.pth", "SiT.pt")
    ]
    found, expected = (load_file(folder / "transformer" / WEIGHTS) for folder in folders)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ArgumentError, match=r"family: .* pass 'dit' or 'sit'"):
        convert(tmp_path / "0001000.pth", tmp_path / "out")

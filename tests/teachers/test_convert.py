"""Pickles of EDM and EDM2, converted."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fdistill.base.errors import ArgumentError, CheckpointError, OutputError
from fdistill.networks import EDM2Network, EDMNetwork
from fdistill.teachers.convert import convert
from support.pickles import Persistent, dumps, edm2_content, edm_content

WEIGHTS = "diffusion_pytorch_model.safetensors"

EDM_SETTINGS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 10,
        "model_type": "SongUNet",
        "augment_dim": 9,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "dropout": 0.13,
    },
    "DhariwalUNet": {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 0,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
    },
}

EDM2_SETTINGS: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 4,
    "label_dim": 10,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
    "logvar_channels": 12,
}


def noisy(network: nn.Module) -> nn.Module:
    """With no parameter left at zero or one, as initialisation leaves some."""
    torch.manual_seed(1)
    for tensor in network.parameters():
        tensor.data = torch.randn_like(tensor) * 0.1
    return network.eval()


def edm_network(model_type: str) -> nn.Module:
    return noisy(EDMNetwork(**({"model_type": model_type} | EDM_SETTINGS[model_type])))


def outputs(network: Any, channels: int, label_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, channels, 8, 8, generator=generator)
    labels = F.one_hot(torch.tensor([1, 0, 7]), label_dim).float() if label_dim else None
    with torch.no_grad():
        result: Tensor = network(x, torch.tensor([-1.0, 0.2, 0.9]), labels)
    return result


def saved(folder: Path, data: bytes, name: str = "edm-cifar10.pkl") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("model_type", EDM_SETTINGS)
def test_an_edm_pickle_becomes_the_same_network(model_type: str, protocol: int, tmp_path: Path, marker: Path) -> None:
    network, settings = edm_network(model_type), EDM_SETTINGS[model_type]
    published = {name: value for name, value in settings.items() if name != "model_type" or value != "DhariwalUNet"}
    source = saved(tmp_path, dumps(edm_content(network, marker, use_fp16=True, **published), protocol))
    folder = convert(source, tmp_path / "teacher")
    assert folder == tmp_path / "teacher"
    assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS, "README.md"}
    assert not marker.exists()

    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == network.state_dict().keys()
    converted = EDMNetwork.from_pretrained(folder).eval()
    shape = settings["img_channels"], settings["label_dim"]
    assert torch.equal(outputs(converted, *shape), outputs(network, *shape))

    config = json.loads((folder / "config.json").read_text())
    assert (config["sigma_min"], config["sigma_max"], config["sigma_data"]) == (0.002, 80.0, 0.5)
    assert config["model_type"] == model_type
    card = (folder / "README.md").read_text()
    assert hashlib.sha256(source.read_bytes()).hexdigest() in card
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in card
    assert "edm-cifar10.pkl" in card
    assert str(tmp_path) not in card


def test_levels_of_the_pickle_itself_are_kept_where_they_are_finite(tmp_path: Path, marker: Path) -> None:
    for given, expected in (((0.01, 50.0), (0.01, 50.0)), ((0, math.inf), (0.002, 80.0)), ((0.0, 200), (0.002, 200))):
        settings = EDM_SETTINGS["DhariwalUNet"] | {"sigma_min": given[0], "sigma_max": given[1], "sigma_data": 0.7}
        content = edm_content(edm_network("DhariwalUNet"), marker, **settings)
        folder = convert(saved(tmp_path, dumps(content)), tmp_path / f"teacher{given[1]}")
        config = json.loads((folder / "config.json").read_text())
        assert (config["sigma_min"], config["sigma_max"], config["sigma_data"]) == (*expected, 0.7)


def test_positional_arguments_are_read_in_their_published_order(tmp_path: Path, marker: Path) -> None:
    settings = dict(EDM_SETTINGS["SongUNet"])
    content = edm_content(edm_network("SongUNet"), marker)
    first = [settings.pop(name) for name in ("img_resolution", "img_channels", "label_dim")]
    content["ema"].state |= {
        "_init_args": (*first, False, 0.004, 70.0, 0.6, settings.pop("model_type")),
        "_init_kwargs": settings,
    }
    config = json.loads((convert(saved(tmp_path, dumps(content)), tmp_path / "out") / "config.json").read_text())
    assert (config["sigma_min"], config["sigma_max"], config["sigma_data"], config["label_dim"]) == (0.004, 70, 0.6, 10)


@pytest.mark.parametrize("encoder", ["StabilityVAEEncoder", "StandardRGBEncoder", None])
def test_an_edm2_pickle_becomes_the_same_network(encoder: str | None, tmp_path: Path, marker: Path) -> None:
    channels = 3 if encoder == "StandardRGBEncoder" else 4
    settings = EDM2_SETTINGS | {"img_channels": channels}
    network = noisy(EDM2Network(**settings)).half()  # as published
    content = edm2_content(network, marker, encoder, use_fp16=True, resample_filter=[1, 1], **settings)
    folder = convert(saved(tmp_path, dumps(content), "edm2-img512-xs.pkl"), tmp_path / "teacher")
    assert not marker.exists()
    tensors = load_file(folder / WEIGHTS)
    assert all(value.dtype == torch.float32 for value in tensors.values())
    network.float()
    converted = EDM2Network.from_pretrained(folder).eval()
    assert torch.equal(outputs(converted, channels, 10), outputs(network, channels, 10))
    levels = torch.tensor([-1.0, 0.5])
    assert torch.equal(converted.log_variance(levels), network.log_variance(levels))
    config = json.loads((folder / "config.json").read_text())
    card = (folder / "README.md").read_text()
    if channels == 3:
        assert config["latent_scale"] is config["latent_bias"] is None
        assert "vae/" not in card
        return
    scale, bias = torch.tensor(config["latent_scale"]), torch.tensor(config["latent_bias"])
    raw = torch.tensor([5.81, 3.25, 0.12, -2.15]) + torch.tensor([4.17, 4.62, 3.71, 3.28]) * torch.randn(100_000, 4)
    seen = scale * raw + bias  # latents of the assumed mean and standard deviation come out at 0 and 1/2
    torch.testing.assert_close(seen.mean(0), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.full((4,), 0.5), atol=0.01, rtol=0)
    assert config["pixel_range"] == [0, 1]
    assert "stabilityai/sd-vae-ft-mse" in card


def test_a_network_alone_in_its_pickle_is_read(tmp_path: Path, marker: Path) -> None:
    content = edm2_content(noisy(EDM2Network(**EDM2_SETTINGS)), marker, None, **EDM2_SETTINGS)
    folder = convert(saved(tmp_path, dumps(content["ema"])), tmp_path / "teacher")
    assert len(json.loads((folder / "config.json").read_text())["latent_scale"]) == 4


def test_an_encoders_own_numbers_count(tmp_path: Path, marker: Path) -> None:
    network = noisy(EDM2Network(**EDM2_SETTINGS))

    def converted(name: str, *arguments: object, **keywords: object) -> dict[str, Any]:
        content = edm2_content(network, marker, None, **EDM2_SETTINGS)
        content["encoder"] = Persistent("StabilityVAEEncoder", marker, {}, *arguments, **keywords)
        folder = convert(saved(tmp_path, dumps(content)), tmp_path / name)
        assert "another/vae" in (folder / "README.md").read_text()
        loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return loaded

    settings = {"raw_mean": [1, 2, 3, 4], "raw_std": [1, 2, 4, 5], "final_mean": 1, "final_std": 1}
    by_name = converted("by-name", vae_name="another/vae", **settings)
    by_position = converted("by-position", "another/vae", *settings.values())
    for config in (by_name, by_position):
        assert config["latent_scale"] == [1, 0.5, 0.25, 0.2]
        torch.testing.assert_close(torch.tensor(config["latent_bias"]), torch.tensor([0, 0, 0.25, 0.2]))
    with pytest.raises(CheckpointError, match="encoder StabilityVAEEncoder is made from"):
        converted("zero", raw_std=[0, 1, 1, 1])
    with pytest.raises(CheckpointError, match="has a setting 'final_shift' that is not known"):
        converted("other", final_shift=1)


def test_weights_have_to_fit_exactly(tmp_path: Path, marker: Path) -> None:
    def refused(content: Any, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert(saved(tmp_path, dumps(content)), tmp_path / "teacher")
        assert not (tmp_path / "teacher").exists()

    def parameters(content: dict[str, Any]) -> dict[str, Any]:
        layer = content["ema"].state["_modules"]["model"].state["_modules"]["map_layer0"].state
        layer["_parameters"] = dict(layer["_parameters"])
        found: dict[str, Any] = layer["_parameters"]
        return found

    def content(**changes: object) -> dict[str, Any]:
        return edm_content(edm_network("SongUNet"), marker, **(EDM_SETTINGS["SongUNet"] | changes))

    missing, unexpected, misshapen = content(), content(), content()
    del parameters(missing)["bias"]
    refused(missing, r"tensor model\.map_layer0\.bias is missing")
    parameters(unexpected)["scale"] = torch.ones(2)
    refused(unexpected, r"tensor model\.map_layer0\.scale has no place in a EDMNetwork")
    parameters(misshapen)["bias"] = torch.ones(3)
    refused(misshapen, r"tensor model\.map_layer0\.bias has shape \(3,\); expected \(64,\)")
    refused(content(model_channels=32), "has shape")
    refused(content(encoder_type="skip"), "no EDMNetwork can be built")
    refused(content(decoder_type="skip"), "no EDMNetwork can be built")
    refused(content(img_resolution=None), "no EDMNetwork can be built")
    refused(content(num_heads=3), "setting 'num_heads' that is not supported")
    refused(content(dropout=torch.ones(1)), "setting dropout is")
    unknown = edm2_content(noisy(EDM2Network(**EDM2_SETTINGS)), marker, "OtherEncoder", **EDM2_SETTINGS)
    refused(unknown, "encoder OtherEncoder is not supported")


def test_what_holds_no_such_network_is_said(tmp_path: Path, marker: Path) -> None:
    baseline = edm_content(edm_network("SongUNet"), marker, "VPPrecond", **EDM_SETTINGS["SongUNet"])
    for content, found in (
        (baseline, "holds VPPrecond; expected"),
        ({"loss_fn": 1, "dataset_kwargs": {}}, "a dict of 'loss_fn', 'dataset_kwargs'"),
        ({"ema": None}, "holds a NoneType"),
        ([1, 2], "holds a list"),
        ({}, "a dict of nothing"),
        ({"ema": nn.Linear(2, 2)}, r"holds torch\.nn\.modules\.linear\.Linear"),
    ):
        with pytest.raises(CheckpointError, match=found):
            convert(saved(tmp_path, dumps(content)), tmp_path / "teacher")


class Call:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_nothing_of_a_file_is_run(tmp_path: Path, marker: Path) -> None:
    call = Call(f"touch {marker}")
    content = edm_content(edm_network("DhariwalUNet"), marker, **EDM_SETTINGS["DhariwalUNet"]) | {"loss_fn": call}
    with pytest.raises(CheckpointError, match=r"edm-cifar10\.pkl: refused posix\.system"):
        convert(saved(tmp_path, dumps(content)), tmp_path / "teacher")
    torch.save({"weight": torch.ones(1), "call": call}, tmp_path / "DiT.pt")
    for legacy in (True, False):
        torch.save({"call": call}, tmp_path / "DiT.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"DiT\.pt: refused posix\.system"):
            convert(tmp_path / "DiT.pt", tmp_path / "teacher", "dit")
    assert not marker.exists()
    assert not (tmp_path / "teacher").exists()
    torch.load(tmp_path / "DiT.pt", weights_only=False)
    assert marker.exists()


def test_outputs_and_names_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(OutputError, match="not an empty folder"):
        convert(tmp_path / "nowhere.pkl", tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"expected one of \.pkl"):
        convert(tmp_path / "network.onnx", tmp_path / "out")
    with pytest.raises(ArgumentError, match="got 'dit' for a pickle"):
        convert(tmp_path / "network.pkl", tmp_path / "out", "dit")
    with pytest.raises(ArgumentError, match="family: got 'dut'; did you mean 'dit'"):
        convert(tmp_path / "network.pt", tmp_path / "out", "dut")
    for name in ("nowhere.pt", "nowhere.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            convert(tmp_path / name, tmp_path / "out", "dit")

"""EDM networks: names, shapes and numbers of the published checkpoints, and values of an independent implementation."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdistill.adapters.edm import EDMDenoiser, wrap
from fdistill.adapters.pretrained import load_network
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.networks import EDMNetwork
from fdistill.networks.edm_layers import BlockStyle, FusedDownConv, Resample, UNetBlock
from fdistill.students.lora import lora_copy

NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
CIFAR = {"model_type": "SongUNet", "img_resolution": 32, "augment_dim": 9, "channel_mult": [2, 2, 2]}
FFHQ = {"model_type": "SongUNet", "img_resolution": 64, "augment_dim": 9, "channel_mult": [1, 2, 2, 2]}
IMAGENET = {"model_type": "DhariwalUNet", "img_resolution": 64, "label_dim": 1000}

SONG = {
    "img_resolution": 8,
    "label_dim": 3,
    "augment_dim": 2,
    "model_channels": 8,
    "channel_mult": [1, 2, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
ADM = {
    "img_resolution": 8,
    "label_dim": 3,
    "augment_dim": 2,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
TINY: dict[str, dict[str, object]] = {
    "ddpm++": {"model_type": "SongUNet", **SONG},
    "ncsn++": {"model_type": "SongUNet", **SONG, **NCSNPP},
    "adm": {"model_type": "DhariwalUNet", **ADM},
}


def on_meta(**settings: object) -> EDMNetwork:
    with torch.device("meta"):
        return EDMNetwork(**settings)


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def waves(numbers: int, start: float) -> Tensor:
    return torch.sin(0.7 * torch.arange(numbers, dtype=torch.float64) ** 1.3 + start)


def tiny(name: str, **changes: object) -> EDMNetwork:
    """A float64 network in which every tensor is a known function of its place in the state dict."""
    network = EDMNetwork(**(TINY[name] | changes)).double().eval()
    filled = {key: value for key, value in network.state_dict().items() if not key.endswith("resample_filter")}
    for place, (key, value) in enumerate(filled.items()):
        fan_in = value[0].numel() if value.ndim > 1 else 4
        around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        value.copy_((waves(value.numel(), place) / math.sqrt(fan_in)).reshape(value.shape) + around)
    return network


# ---- parameters, by hand ----


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def conv(inputs: int, outputs: int, size: int) -> int:
    return size * size * inputs * outputs + outputs


def song_block(inputs: int, outputs: int, emb: int, *, resampled: bool = False, attention: bool = False) -> int:
    total = 2 * inputs + conv(inputs, outputs, 3) + linear(emb, outputs) + 2 * outputs + conv(outputs, outputs, 3)
    if inputs != outputs or resampled:
        total += conv(inputs, outputs, 1)
    if attention:
        total += 2 * outputs + conv(outputs, 3 * outputs, 1) + conv(outputs, outputs, 1)
    return total


def by_group(network: EDMNetwork) -> dict[str, int]:
    """mapping; enc and dec by resolution; the output layers are those of "aux" in the decoder."""
    sums: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        _, part, *rest = name.split(".")
        place = rest[0].partition("_")[0] if part in ("enc", "dec") else ""
        group = "output" if part == "dec" and "aux" in rest[0] else f"{part.partition('_')[0]}{place}"
        sums[group] += parameter.numel()
    return dict(sums)


@pytest.mark.parametrize("label_dim", [0, 10])
def test_cifar_ddpmpp_has_the_parameters_that_its_shapes_give(label_dim: int) -> None:
    emb, wide = 512, 256
    plain, attending = song_block(wide, wide, emb), song_block(wide, wide, emb, attention=True)
    resampling = song_block(wide, wide, emb, resampled=True)
    joined, joined_attending = song_block(2 * wide, wide, emb), song_block(2 * wide, wide, emb, attention=True)
    expected = {
        "map": (linear(label_dim, 128) if label_dim else 0) + 9 * 128 + linear(128, emb) + linear(emb, emb),
        "enc32x32": conv(3, 128, 3) + song_block(128, wide, emb) + 3 * plain,
        "enc16x16": resampling + 4 * attending,
        "enc8x8": resampling + 4 * plain,
        "dec8x8": attending + plain + 5 * joined,
        "dec16x16": resampling + 4 * joined + joined_attending,
        "dec32x32": resampling + 4 * joined + song_block(wide + 128, wide, emb),
        "output": 2 * wide + conv(wide, 3, 3),
    }
    network = on_meta(**CIFAR, label_dim=label_dim)
    assert by_group(network) == expected
    assert count(network) == sum(expected.values()) == (55_735_299 if label_dim else 55_733_891)


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        (CIFAR | NCSNPP, 56.4),
        (FFHQ, 61.8),
        (FFHQ | NCSNPP, 62.8),
        (IMAGENET, 295.9),
    ],
)
def test_published_sizes(settings: dict[str, object], millions: float) -> None:
    assert round(count(on_meta(**settings)) / 1e6, 1) == millions


# ---- names ----

BLOCK = ["norm0.weight", "norm0.bias", "conv0.weight", "conv0.bias", "affine.weight", "affine.bias"]
BLOCK += ["norm1.weight", "norm1.bias", "conv1.weight", "conv1.bias"]
ATTENTION = ["norm2.weight", "norm2.bias", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
RESAMPLED = ["conv0.weight", "conv0.bias", "conv0.resample_filter"]


def of(names: list[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def test_names_of_the_published_conditional_cifar_checkpoint() -> None:
    state = on_meta(**CIFAR, label_dim=10).state_dict()
    names = list(state)
    assert names[:10] == [
        "model.map_label.weight",
        "model.map_label.bias",
        "model.map_augment.weight",
        "model.map_layer0.weight",
        "model.map_layer0.bias",
        "model.map_layer1.weight",
        "model.map_layer1.bias",
        "model.enc.32x32_conv.weight",
        "model.enc.32x32_conv.bias",
        "model.enc.32x32_block0.norm0.weight",
    ]
    assert names[-4:] == [
        "model.dec.32x32_aux_norm.weight",
        "model.dec.32x32_aux_norm.bias",
        "model.dec.32x32_aux_conv.weight",
        "model.dec.32x32_aux_conv.bias",
    ]
    skip = ["skip.weight", "skip.bias"]
    assert of(names, "model.enc.32x32_block0.") == BLOCK + skip
    assert of(names, "model.enc.32x32_block1.") == BLOCK
    assert of(names, "model.enc.16x16_block3.") == BLOCK + ATTENTION
    assert of(names, "model.dec.8x8_in0.") == BLOCK + ATTENTION
    assert of(names, "model.dec.16x16_block4.") == BLOCK + skip + ATTENTION
    for place in ("model.enc.16x16_down.", "model.dec.32x32_up."):
        assert of(names, place) == BLOCK[:2] + RESAMPLED + BLOCK[4:] + skip + ["skip.resample_filter"]
    modules = list(
        dict.fromkeys(".".join(name.split(".")[1:3]) for name in names if ".enc." in name or ".dec." in name)
    )
    assert modules == [
        *[f"enc.32x32_{part}" for part in ("conv", "block0", "block1", "block2", "block3")],
        *[f"enc.16x16_{part}" for part in ("down", "block0", "block1", "block2", "block3")],
        *[f"enc.8x8_{part}" for part in ("down", "block0", "block1", "block2", "block3")],
        *[f"dec.8x8_{part}" for part in ("in0", "in1", "block0", "block1", "block2", "block3", "block4")],
        *[f"dec.16x16_{part}" for part in ("up", "block0", "block1", "block2", "block3", "block4")],
        *[f"dec.32x32_{part}" for part in ("up", "block0", "block1", "block2", "block3", "block4")],
        "dec.32x32_aux_norm",
        "dec.32x32_aux_conv",
    ]
    assert state["model.map_label.weight"].shape == (128, 10)
    assert state["model.enc.16x16_block0.qkv.weight"].shape == (768, 256, 1, 1)
    assert state["model.enc.16x16_down.conv0.resample_filter"].shape == (1, 1, 2, 2)
    assert state["model.dec.32x32_block4.conv0.weight"].shape == (256, 384, 3, 3)


def test_names_of_the_published_ncsnpp_checkpoints() -> None:
    state = on_meta(**FFHQ, **NCSNPP).state_dict()
    names = list(state)
    assert names[:3] == ["model.map_noise.freqs", "model.map_augment.weight", "model.map_layer0.weight"]
    assert state["model.map_noise.freqs"].shape == (128,)
    shortcut = of(names, "model.enc.32x32_aux_residual.")
    assert shortcut == ["weight", "bias", "resample_filter"]
    assert state["model.enc.32x32_aux_residual.weight"].shape == (128, 3, 3, 3)
    assert state["model.enc.16x16_aux_residual.weight"].shape == (256, 128, 3, 3)
    assert state["model.enc.8x8_aux_residual.weight"].shape == (256, 256, 3, 3)
    assert state["model.enc.8x8_aux_residual.resample_filter"].shape == (1, 1, 4, 4)
    place = names.index("model.enc.32x32_aux_residual.weight")
    assert names[place - 1] == "model.enc.32x32_down.skip.resample_filter"
    assert names[place + 3] == "model.enc.32x32_block0.norm0.weight"


def test_names_of_the_published_imagenet_64_checkpoint() -> None:
    state = on_meta(**IMAGENET).state_dict()
    names = list(state)
    assert names[:7] == [
        "model.map_layer0.weight",
        "model.map_layer0.bias",
        "model.map_layer1.weight",
        "model.map_layer1.bias",
        "model.map_label.weight",
        "model.enc.64x64_conv.weight",
        "model.enc.64x64_conv.bias",
    ]
    out = ["model.out_norm.weight", "model.out_norm.bias", "model.out_conv.weight", "model.out_conv.bias"]
    assert names[-4:] == out
    assert of(names, "model.enc.32x32_down.") == BLOCK[:2] + RESAMPLED + BLOCK[4:] + ["skip.resample_filter"]
    assert of(names, "model.dec.8x8_block1.") == [*BLOCK, "skip.weight", "skip.bias", *ATTENTION]
    assert of(names, "model.dec.64x64_block3.") == [*BLOCK, "skip.weight", "skip.bias"]
    assert state["model.map_label.weight"].shape == (768, 1000)
    assert state["model.enc.8x8_block0.affine.weight"].shape == (1536, 768)


# ---- values ----


@pytest.mark.parametrize(
    ("name", "some", "mean_square"),
    [
        (
            "ddpm++",
            [0.19128, 0.46713, 0.241563, 0.37438, 0.557479, 0.38817, 0.553348, 0.105592, 0.325554],
            0.214709779269463,
        ),
        (
            "ncsn++",
            [-0.111559, -0.235454, 0.564907, 0.797045, 0.636118, -0.128538, 0.004076, 0.674609, 0.457261],
            0.17283218107226803,
        ),
        (
            "adm",
            [-0.02735, 0.116086, 1.165525, 0.065777, 0.553836, -0.414609, 1.562559, -0.27118, 0.101074],
            0.479609241489002,
        ),
    ],
)
def test_values_are_those_of_an_independent_implementation(name: str, some: list[float], mean_square: float) -> None:
    # Pinned from nvidia-physicsnemo 2.2.2 (Apache-2.0) with the same weights, in training mode: in eval mode its group
    # norm divides by the unbiased variance, which the published networks do not.
    x = waves(2 * 3 * 64, 0.3).reshape(2, 3, 8, 8)
    c_noise = torch.tensor([-1.2, 0.8], dtype=torch.float64)
    labels = torch.eye(3, dtype=torch.float64)[[0, 2]]
    augment = torch.tensor([[0.5, -1.0], [0.25, 1.0]], dtype=torch.float64)
    output = tiny(name)(x, c_noise, labels, augment)
    torch.testing.assert_close(output.flatten()[::47], torch.tensor(some, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.square().mean().item(), mean_square, rtol=1e-6, atol=0)


def style(**changes: object) -> BlockStyle:
    settings: dict[str, object] = {
        "emb_channels": 6,
        "head_channels": None,
        "dropout": 0.0,
        "skip_scale": math.sqrt(0.5),
        "eps": 1e-6,
        "resample_filter": (1, 1),
        "project_resampled": True,
        "adaptive_scale": False,
    }
    return BlockStyle(**(settings | changes))  # type: ignore[arg-type]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    return module.double()


@pytest.mark.parametrize("head_channels", [None, 8])
def test_attention_is_softmax_of_materialised_weights(head_channels: int | None) -> None:
    block = randomised(UNetBlock(16, 16, None, True, style(head_channels=head_channels)))
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    qkv = F.conv2d(
        F.group_norm(x, 4, block.norm2.weight, block.norm2.bias, 1e-6), block.qkv.weight, block.qkv.bias
    ).flatten(2)
    size = head_channels or 16
    heads = []
    for first in range(0, 16, size):  # channels of a head: (q0, k0, v0, q1, k1, v1, ...)
        q, k, v = (qkv[:, 3 * first + part : 3 * (first + size) : 3] for part in range(3))
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(size), dim=2)
        heads.append(torch.einsum("bqk,bck->bcq", weights, v))
    torch.testing.assert_close(block._attention(x), torch.cat(heads, dim=1).reshape(x.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_filters_pixel_by_pixel(taps: tuple[int, ...]) -> None:
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    weights = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    reach = (len(taps) - 1) // 2
    smaller = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    larger = torch.zeros(1, 2, 12, 16, dtype=torch.float64)
    for a, u in enumerate(weights):
        for b, v in enumerate(weights):
            for row in range(6):
                for column in range(8):
                    # Output pixel i averages inputs 2 i - reach + tap; upwards, input i spreads to 2 i - reach + tap.
                    i, odd_i = divmod(row + reach - a, 2)
                    j, odd_j = divmod(column + reach - b, 2)
                    if not odd_i and not odd_j and 0 <= i < 3 and 0 <= j < 4:
                        smaller[..., i, j] += u * v * x[..., row, column]
                    i, j = 2 * row - reach + a, 2 * column - reach + b
                    if 0 <= i < 12 and 0 <= j < 16:
                        larger[..., i, j] += 4 * u * v * x[..., row, column]
    torch.testing.assert_close(Resample("down", taps).double()(x), smaller)
    torch.testing.assert_close(Resample("up", taps).double()(x), larger)
    if taps == (1, 1):
        torch.testing.assert_close(smaller, F.avg_pool2d(x, 2))
        torch.testing.assert_close(larger, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_residual_encoders_filter_sees_past_the_border() -> None:
    layer = randomised(FusedDownConv(3, 5, 3, (1, 3, 3, 1)))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    wider = F.conv2d(F.pad(x, (2, 2, 2, 2)), layer.weight, layer.bias)  # 10 x 10
    patches = wider.unfold(2, 4, 2).unfold(3, 4, 2)
    torch.testing.assert_close(layer(x), torch.einsum("bchwij,i,j->bchw", patches, line, line))


def test_unusable_filters_are_refused() -> None:
    for taps in ((1, 2), (1, 2, 1), ()):
        with pytest.raises(ArgumentError, match="symmetric filter of even length"):
            Resample("up", taps)


# ---- labels and features ----


@pytest.mark.parametrize("name", TINY)
def test_no_label_and_no_augmentation_are_zeros(name: str) -> None:
    network = tiny(name)
    x, c_noise = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([-0.5, 0.9], dtype=torch.float64)
    labels = torch.eye(3, dtype=torch.float64)[[1, 0]]
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(network(x, c_noise, labels), network(x, c_noise, labels, zeros))
    assert not torch.allclose(network(x, c_noise, labels), network(x, c_noise, labels, zeros + 1))
    assert torch.equal(network(x, c_noise), network(x, c_noise, torch.zeros_like(labels)))

    denoiser = EDMDenoiser(network)
    sigma = (4 * c_noise).exp()
    given = denoiser.predict(x, sigma, torch.tensor([1, 0]))[0].output
    torch.testing.assert_close(given, network(x, sigma.log() / 4, labels), rtol=0, atol=0)
    none = denoiser.predict(x, sigma, torch.tensor([3, 3]))[0].output
    torch.testing.assert_close(none, network(x, sigma.log() / 4), rtol=0, atol=0)
    with pytest.raises(ArgumentError, match=r"class labels \[B\] in \[0, 3\)"):
        denoiser.predict(x, sigma, None)


@pytest.mark.parametrize("name", TINY)
def test_reading_features_changes_nothing_and_stops_where_they_end(name: str) -> None:
    network = tiny(name)
    denoiser = EDMDenoiser(network)
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.3, 20.0], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    rows = torch.eye(3, dtype=torch.float64)[labels]
    names = tuple(denoiser.feature_shapes)
    prediction, features = denoiser.predict(x, t, labels, names)
    assert torch.equal(prediction.output, network(x, t.log() / 4, rows))
    assert tuple(features) == names
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == denoiser.feature_shapes

    ran: list[str] = []
    for part in ("enc", "dec"):
        for key, module in network.model.get_submodule(part).items():
            module.register_forward_hook(lambda *_, key=f"{part}.{key}": ran.append(key))
    for chosen in names:
        ran.clear()
        alone = denoiser.features(x, t, labels, (chosen,))
        assert list(alone) == [chosen]
        assert torch.equal(alone[chosen], features[chosen])
        decoder = [key for key in ran if key.startswith("dec")]
        lowest = f"dec.{4 if name == 'adm' else 2}x{4 if name == 'adm' else 2}"
        assert decoder == ([f"{lowest}_in0", f"{lowest}_in1"] if chosen == "mid" else [])


def test_features_are_what_the_next_resolution_gets() -> None:
    network = tiny("ddpm++", num_blocks=2)
    received: dict[str, Tensor] = {}
    for feature, place in {
        "enc8": "enc.4x4_down",
        "enc4": "enc.2x2_down",
        "enc2": "dec.2x2_in0",
        "mid": "dec.2x2_block0",
    }.items():
        network.model.get_submodule(place).register_forward_pre_hook(
            lambda _, arguments, feature=feature: received.update({feature: arguments[0]})
        )
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.3, 20.0], dtype=torch.float64)
    _, features = EDMDenoiser(network).predict(x, t, torch.tensor([2, 0]), ("enc8", "enc4", "enc2", "mid"))
    for feature, value in features.items():
        assert torch.equal(value, received[feature][:, : value.shape[1]])


@pytest.mark.parametrize("chosen", ["enc4", "mid"])
def test_without_output_gradients_only_features_have_a_graph(chosen: str) -> None:
    denoiser = EDMDenoiser(tiny("ddpm++"))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    t, labels = torch.tensor([0.3, 20.0], dtype=torch.float64), torch.tensor([2, 0])
    kept: list[bool] = []
    hook = denoiser.network.model.dec["2x2_in0"].register_forward_hook(
        lambda _, arguments, output: kept.append(output.requires_grad)
    )
    prediction, features = denoiser.predict(x, t, labels, (chosen,), output_grad=False)
    hook.remove()
    assert kept == [chosen == "mid"]
    assert not prediction.output.requires_grad
    features[chosen].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    in0 = denoiser.network.model.dec["2x2_in0"].conv1.weight
    assert (in0.grad is not None) == (chosen == "mid")
    full, _ = denoiser.predict(x, t, labels)
    assert torch.equal(full.output, prediction.output)
    full.output.square().sum().backward()
    assert all(p.grad is not None for n, p in denoiser.named_parameters() if "map_augment" not in n)


def test_features_of_published_networks() -> None:
    assert EDMDenoiser(on_meta(**CIFAR)).feature_shapes == {
        "enc32": (256, 32, 32),
        "enc16": (256, 16, 16),
        "enc8": (256, 8, 8),
        "mid": (256, 8, 8),
    }
    imagenet = EDMDenoiser(on_meta(**IMAGENET))
    assert imagenet.feature_shapes["mid"] == (768, 8, 8)
    assert (imagenet.sample_shape, imagenet.num_classes, imagenet.null_class) == ((3, 64, 64), 1000, None)
    assert EDMDenoiser(on_meta(**CIFAR)).num_classes is None
    assert EDMDenoiser(on_meta(**CIFAR, label_dim=10, label_dropout=0.1)).null_class == 10


# ---- preconditioning ----


def test_x0_is_the_papers_formula() -> None:
    network = tiny("ddpm++", sigma_data=0.6, sigma_min=0.01, sigma_max=50.0)
    denoiser = EDMDenoiser(network)
    sigma = torch.tensor([0.01, 0.5, 50.0], dtype=torch.float64)
    s = sigma.reshape(-1, 1, 1, 1)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64) * s
    raw = network(x / (s**2 + 0.36).sqrt(), sigma.log() / 4, torch.eye(3, dtype=torch.float64))
    expected = 0.36 / (s**2 + 0.36) * x + s * 0.6 / (s**2 + 0.36).sqrt() * raw
    torch.testing.assert_close(denoiser.denoise(x, sigma, torch.tensor([0, 1, 2])), expected, rtol=1e-9, atol=1e-9)
    assert (denoiser.schedule.t_min, denoiser.schedule.t_max, denoiser.sigma_data) == (0.01, 50.0, 0.6)
    assert denoiser.kind == EDMDenoiser(tiny("adm", sigma_data=0.6)).kind
    assert denoiser.kind != EDMDenoiser(tiny("adm")).kind


def test_a_new_network_starts_near_zero_output() -> None:
    torch.manual_seed(0)
    x, c_noise = torch.randn(2, 3, 8, 8), torch.zeros(2)
    song = EDMNetwork(**TINY["ddpm++"])
    assert song(x, c_noise).abs().max() < 1e-3
    down = song.model.enc["4x4_down"].conv0.weight  # uniform over +-sqrt(6 / (fan in + fan out))
    assert down.abs().max().item() == pytest.approx(math.sqrt(6 / (9 * 8 + 9 * 8)), rel=0.02)
    assert all(p.abs().max() == 0 for n, p in song.named_parameters() if n.endswith("bias"))
    assert EDMNetwork(**TINY["adm"])(x, c_noise).abs().max() == 0


def test_half_precision_and_autocast_stay_near() -> None:
    network = tiny("ddpm++").float()
    x, c_noise, rows = torch.randn(2, 3, 8, 8), torch.tensor([-0.5, 0.9]), torch.eye(3)[:2]
    full = network(x, c_noise, rows)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x.bfloat16(), c_noise, rows)
    low = network.bfloat16()(x.bfloat16(), c_noise, rows)
    for output in (mixed, low):
        assert output.dtype == torch.bfloat16
        assert (output - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("name", TINY)
def test_low_rank_adapters_can_be_trained_on_it(name: str) -> None:
    pytest.importorskip("peft")
    denoiser = EDMDenoiser(tiny(name).float()).requires_grad_(False)
    x_t, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 60.0]), torch.tensor([0, 1])
    adapted = lora_copy(denoiser, 2)
    output = adapted.denoise(x_t, t, labels)
    torch.testing.assert_close(output, denoiser.denoise(x_t, t, labels))
    output.square().mean().backward()
    grown = [n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert any("conv0" in n for n in grown)
    assert all("lora_" in n for n in grown)


# ---- files ----


def test_a_saved_network_loads_bit_by_bit_and_without_dropout(tmp_path: Path) -> None:
    network = tiny("ncsn++", dropout=0.5).float()
    network.save_pretrained(tmp_path)
    denoiser = wrap(load_network(EDMNetwork, tmp_path), None)
    x_t, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 60.0]), torch.tensor([0, 1])
    expected = EDMDenoiser(network.eval()).denoise(x_t, t, labels)
    assert torch.equal(denoiser.train().denoise(x_t, t, labels), expected)
    assert not torch.equal(EDMDenoiser(network.train()).denoise(x_t, t, labels), expected)
    loaded = denoiser.network.state_dict()
    assert list(loaded) == list(network.state_dict())
    assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())

    denoiser.network.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["_class_name"], config["dropout"], config["resample_filter"]) == ("EDMNetwork", 0.0, [1, 3, 3, 1])
    assert config["encoder_type"] == "residual"
    other = denoiser.with_network(EDMNetwork.from_config({**denoiser.network.config, "num_blocks": 2}))
    assert type(other) is EDMDenoiser
    assert other.sample_shape == denoiser.sample_shape


def test_broken_files_say_what_is_wrong(tmp_path: Path) -> None:
    tiny("ddpm++").float().save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    good, settings = weights.read_bytes(), json.loads(config.read_text())

    tensors = load_file(weights)
    tensors.pop("model.dec.8x8_aux_conv.bias")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys such as model\.dec\.8x8_aux_conv\.bias"):
        load_network(EDMNetwork, tmp_path)
    weights.write_bytes(good[:-100])
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_network(EDMNetwork, tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_network(EDMNetwork, tmp_path)
    weights.write_bytes(good)
    config.write_text(json.dumps(settings | {"model_channels": 16}))
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_network(EDMNetwork, tmp_path)
    config.write_text(json.dumps(settings | {"num_blocks": 2}))
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_network(EDMNetwork, tmp_path)
    config.write_text(json.dumps(settings | {"model_type": "SongUnet"}))
    with pytest.raises(CheckpointError, match="did you mean 'SongUNet'"):
        load_network(EDMNetwork, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "SongUnet"}, "did you mean 'SongUNet'"),
        ({"decoder_type": "skip"}, "expected 'standard'"),
        ({"encoder_type": "residul"}, "did you mean 'residual'"),
        ({"embedding_type": "fourrier"}, "did you mean 'fourier'"),
        ({"model_type": "DhariwalUNet", "encoder_type": "residual"}, "encoder_type: DhariwalUNet has no such setting"),
        ({"model_type": "DhariwalUNet", "model_channels": 24}, "expected a multiple of 64"),
    ],
)
def test_settings_that_no_network_has_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        EDMNetwork(**(TINY["ddpm++"] | changes))

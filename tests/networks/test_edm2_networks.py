"""EDM2 networks: names, shapes and numbers of the published checkpoints, values written out formula by formula, and
what magnitude preservation promises.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdistill.adapters.edm2 import EDM2Denoiser, wrap
from fdistill.adapters.pretrained import load_network
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.networks import EDM2_CHANNELS, EDM2Network
from fdistill.networks.edm2_layers import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, unit_rms
from fdistill.networks.edm2_unet import MPBlock

LATENT = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000}
TINY: dict[str, object] = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
    "logvar_channels": 8,
}


def on_meta(**settings: object) -> EDM2Network:
    with torch.device("meta"):
        return EDM2Network(**settings)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny(**changes: object) -> EDM2Network:
    """Float64, with gains that a trained network has (they start at 0)."""
    torch.manual_seed(3)
    network = EDM2Network(**(TINY | changes)).double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("_gain"):
                parameter.copy_(torch.randn([]))
            else:
                parameter.mul_(torch.rand([]) + 0.5)
    return network


# ---- parameters and names ----


@pytest.mark.parametrize(
    ("size", "millions"),  # arXiv 2312.02696, table 2
    [("xs", 124.7), ("s", 280.2), ("m", 497.8), ("l", 777.5), ("xl", 1119.3), ("xxl", 1523.2)],
)
def test_published_sizes(size: str, millions: float) -> None:
    network = on_meta(**LATENT, model_channels=EDM2_CHANNELS[size])
    assert round(count(network) / 1e6, 1) == millions


def test_a_size_follows_from_its_shapes() -> None:
    c, emb = 128, 512

    def block(inputs: int, outputs: int, first: int, *, attention: bool = False) -> int:
        total = 1 + 9 * first * outputs + emb * outputs + 9 * outputs * outputs
        return total + (inputs * outputs if inputs != outputs else 0) + (4 * outputs * outputs if attention else 0)

    def encoder(inputs: int, outputs: int, attention: bool = False) -> int:
        return block(inputs, outputs, outputs, attention=attention)

    def decoder(inputs: int, outputs: int, attention: bool = False) -> int:
        return block(inputs, outputs, inputs, attention=attention)

    enc = 9 * 5 * c + 3 * encoder(c, c)
    for level, attention in ((1, False), (2, True), (3, True)):
        narrow, wide = level * c, (level + 1) * c
        enc += encoder(narrow, narrow) + encoder(narrow, wide, attention) + 2 * encoder(wide, wide, attention)
    dec = decoder(4 * c, 4 * c, True) + decoder(4 * c, 4 * c)
    dec += sum(decoder(inputs * c, 4 * c, True) for inputs in (8, 8, 8, 7))
    dec += decoder(4 * c, 4 * c) + sum(decoder(inputs * c, 3 * c, True) for inputs in (7, 6, 6, 5))
    dec += decoder(3 * c, 3 * c) + sum(decoder(inputs * c, 2 * c) for inputs in (5, 4, 4, 3))
    dec += decoder(2 * c, 2 * c) + sum(decoder(inputs * c, c) for inputs in (3, 2, 2, 2))
    network = on_meta(**LATENT, model_channels=c)
    unet = network.unet
    assert count(unet.enc) == enc
    assert count(unet.dec) == dec
    assert count(unet) == enc + dec + 1 + c * emb + 1000 * emb + 9 * c * 4
    assert count(network) - count(unet) == 128


def test_names_of_the_published_checkpoints() -> None:
    state = on_meta(**LATENT, model_channels=128).state_dict()
    names = list(state)
    assert names[:12] == [
        "unet.out_gain",
        "unet.emb_fourier.freqs",
        "unet.emb_fourier.phases",
        "unet.emb_noise.weight",
        "unet.emb_label.weight",
        "unet.enc.64x64_conv.weight",
        "unet.enc.64x64_block0.emb_gain",
        "unet.enc.64x64_block0.conv_res0.weight",
        "unet.enc.64x64_block0.emb_linear.weight",
        "unet.enc.64x64_block0.conv_res1.weight",
        "unet.enc.64x64_block1.emb_gain",
        "unet.enc.64x64_block1.conv_res0.weight",
    ]
    assert names[-6:] == [
        "unet.dec.64x64_block3.conv_res1.weight",
        "unet.dec.64x64_block3.conv_skip.weight",
        "unet.out_conv.weight",
        "logvar_fourier.freqs",
        "logvar_fourier.phases",
        "logvar_linear.weight",
    ]
    block = ["emb_gain", "conv_res0.weight", "emb_linear.weight", "conv_res1.weight"]
    attention = ["attn_qkv.weight", "attn_proj.weight"]

    def of(place: str) -> list[str]:
        return [name.removeprefix(place) for name in names if name.startswith(place)]

    assert of("unet.enc.16x16_block0.") == [*block, "conv_skip.weight", *attention]
    assert of("unet.enc.16x16_down.") == block
    assert of("unet.dec.8x8_in0.") == block + attention
    assert of("unet.dec.8x8_in1.") == block
    assert of("unet.dec.16x16_up.") == block
    assert of("unet.dec.16x16_block3.") == [*block, "conv_skip.weight", *attention]
    assert state["unet.out_gain"].shape == ()
    assert state["unet.emb_fourier.freqs"].shape == (128,)
    assert state["unet.emb_label.weight"].shape == (512, 1000)
    assert state["unet.enc.64x64_conv.weight"].shape == (128, 5, 3, 3)
    assert state["unet.enc.16x16_block0.attn_qkv.weight"].shape == (1152, 384, 1, 1)
    assert state["unet.dec.8x8_block3.conv_res0.weight"].shape == (512, 896, 3, 3)
    assert state["logvar_linear.weight"].shape == (1, 128)
    assert "unet.emb_label.weight" not in on_meta(**(LATENT | {"label_dim": 0})).state_dict()


# ---- values ----


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def written_out(state: dict[str, Tensor], x: Tensor, c_noise: Tensor, rows: Tensor) -> Tensor:
    """The whole forward pass of TINY, from the paper's equations and a state dict alone."""

    def weight(name: str) -> Tensor:
        rows_of = state[f"unet.{name}.weight"].flatten(1)
        norm = rows_of.square().sum(1, keepdim=True).sqrt()
        fan_in = rows_of.shape[1]
        # Unit length: w / |w|, with eps = 1e-4 added to |w| / sqrt(fan_in).
        unit = rows_of / math.sqrt(fan_in) / (norm / math.sqrt(fan_in) + 1e-4)
        return unit.reshape(state[f"unet.{name}.weight"].shape)

    def silu(v: Tensor) -> Tensor:
        return v * torch.sigmoid(v) / 0.596

    def attend(name: str, v: Tensor) -> Tensor:
        b, c, h, w = v.shape
        qkv = torch.einsum("oi,bihw->bohw", weight(f"{name}.attn_qkv")[:, :, 0, 0], v).reshape(b, c // 8, 8, 3, h * w)
        qkv = qkv / (1e-4 + qkv.square().mean(2, keepdim=True).sqrt())
        q, k, value = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        scores = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(8), dim=3)
        mixed = torch.einsum("nhqk,nhck->nhcq", scores, value).reshape(b, c, h, w)
        out = torch.einsum("oi,bihw->bohw", weight(f"{name}.attn_proj")[:, :, 0, 0], mixed)
        return (0.7 * v + 0.3 * out) / math.sqrt(0.58)

    def block(name: str, v: Tensor, *, encoder: bool) -> Tensor:
        skip = f"unet.{name}.conv_skip.weight" in state
        if encoder:
            if skip:
                v = F.conv2d(v, weight(f"{name}.conv_skip"))
            v = v / (1e-4 + v.square().mean(1, keepdim=True).sqrt())
        y = F.conv2d(silu(v), weight(f"{name}.conv_res0"), padding=1)
        scale = 1 + state[f"unet.{name}.emb_gain"] * emb @ weight(f"{name}.emb_linear").T
        y = F.conv2d(silu(y * scale[:, :, None, None]), weight(f"{name}.conv_res1"), padding=1)
        if not encoder and skip:
            v = F.conv2d(v, weight(f"{name}.conv_skip"))
        v = (0.7 * v + 0.3 * y) / math.sqrt(0.58)
        return attend(name, v) if f"unet.{name}.attn_qkv.weight" in state else v

    def join(a: Tensor, b: Tensor) -> Tensor:
        na, nb = a.shape[1], b.shape[1]
        return math.sqrt((na + nb) / 0.5) * torch.cat([0.5 / math.sqrt(na) * a, 0.5 / math.sqrt(nb) * b], dim=1)

    angles = c_noise[:, None] * state["unet.emb_fourier.freqs"] + state["unet.emb_fourier.phases"]
    emb = math.sqrt(2) * angles.cos() @ weight("emb_noise").T
    emb = (0.5 * emb + 0.5 * (rows * math.sqrt(3)) @ weight("emb_label").T) / math.sqrt(0.5)
    emb = silu(emb)

    s0 = F.conv2d(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), weight("enc.8x8_conv"), padding=1)
    s1 = block("enc.8x8_block0", s0, encoder=True)
    s2 = block("enc.4x4_down", (s1[..., ::2, :] + s1[..., 1::2, :]).unfold(3, 2, 2).sum(-1) / 4, encoder=True)
    s3 = block("enc.4x4_block0", s2, encoder=True)
    v = block("dec.4x4_in1", block("dec.4x4_in0", s3, encoder=False), encoder=False)
    v = block("dec.4x4_block0", join(v, s3), encoder=False)
    v = block("dec.4x4_block1", join(v, s2), encoder=False)
    v = block("dec.8x8_up", v.repeat_interleave(2, 2).repeat_interleave(2, 3), encoder=False)
    v = block("dec.8x8_block0", join(v, s1), encoder=False)
    v = block("dec.8x8_block1", join(v, s0), encoder=False)
    return state["unet.out_gain"] * F.conv2d(v, weight("out_conv"), padding=1)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.tensor([-1.1, 0.8], dtype=torch.float64), torch.eye(3, dtype=torch.float64)[[2, 0]]


def test_values_are_those_of_the_formulas() -> None:
    network = tiny()
    x, c_noise, rows = inputs()
    expected = written_out(network.state_dict(), x, c_noise, rows)
    assert rms(expected) > 0.1
    torch.testing.assert_close(network(x, c_noise, rows), expected, rtol=1e-9, atol=1e-9)
    unlabelled = written_out(network.state_dict(), x, c_noise, torch.zeros_like(rows))
    torch.testing.assert_close(network(x, c_noise), unlabelled, rtol=1e-9, atol=1e-9)


def test_activations_are_clipped() -> None:
    network = tiny(clip_act=0.5)
    _, features = EDM2Denoiser(network).predict(inputs()[0], torch.ones(2), torch.tensor([0, 1]), ("enc8", "mid"))
    assert all(value.abs().max() == 0.5 for value in features.values())
    # None, which EDM2's code documents, is no clipping.
    unclipped, wide = tiny(clip_act=None), tiny(clip_act=1e9)
    x, c_noise, rows = inputs()
    assert torch.equal(unclipped(x, c_noise, rows), wide(x, c_noise, rows))


def test_the_uncertainty_is_a_cosine_series() -> None:
    network = tiny()
    c_noise = torch.linspace(-1.5, 1.0, 5, dtype=torch.float64)
    state = network.state_dict()
    series = (c_noise[:, None] * state["logvar_fourier.freqs"] + state["logvar_fourier.phases"]).cos()
    weights = state["logvar_linear.weight"][0]
    expected = math.sqrt(2) * series @ weights / (weights.norm() + math.sqrt(8) * 1e-4)
    torch.testing.assert_close(network.log_variance(c_noise), expected)


# ---- magnitudes ----


def test_layers_keep_the_magnitude_of_normal_inputs() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 32, 16, 16), torch.randn(64, 96, 16, 16)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.01)
    for t in (0.1, 0.3, 0.5):
        assert rms(mp_sum(a, b[:, :32], t)) == pytest.approx(1, abs=0.01)
        joined = mp_cat(a, b, t)
        assert joined.shape == (64, 128, 16, 16)
        assert rms(joined) == pytest.approx(1, abs=0.01)
        share = joined[:, 32:].square().sum() / joined.square().sum()
        assert share.item() == pytest.approx(t**2 / (t**2 + (1 - t) ** 2), abs=0.01)
    torch.testing.assert_close(mp_cat(a, b, 0.5)[:, :32] / a, torch.full_like(a, math.sqrt(128 / 64)))
    assert rms(MPFourier(256)(torch.linspace(-2, 2, 200))) == pytest.approx(1, abs=0.02)
    assert rms(MPConv(32, 64, 1)(a)) == pytest.approx(1, abs=0.1)
    assert rms(MPConv(96, 64, 3)(b)[..., 1:-1, 1:-1]) == pytest.approx(1, abs=0.05)
    assert rms(MPConv(32, 64)(a[:, :, 0, 0])) == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(unit_rms(7 * a, (1,)).square().mean(1), torch.ones(64, 16, 16), rtol=1e-3, atol=1e-3)
    assert unit_rms(torch.zeros(2, 3, requires_grad=True), (1,)).abs().max() == 0


@pytest.mark.parametrize("of_encoder", [True, False])
@pytest.mark.parametrize("resampling", [None, "up"])
def test_blocks_keep_the_magnitude_of_normal_inputs(of_encoder: bool, resampling: str | None) -> None:
    torch.manual_seed(0)
    block = MPBlock(
        48,
        64,
        32,
        of_encoder=of_encoder,
        resampling=resampling,  # type: ignore[arg-type]
        heads=2,
        dropout=0.0,
        res_balance=0.3,
        attn_balance=0.3,
        clip_act=256.0,
    )
    output = block(torch.randn(8, 48, 16, 16), torch.randn(8, 32))
    assert rms(output) == pytest.approx(1, abs=0.12)


def test_a_new_networks_activations_have_unit_magnitude_and_its_output_is_zero() -> None:
    torch.manual_seed(0)
    network = EDM2Network(**(TINY | {"model_channels": 32}))
    denoiser = EDM2Denoiser(network)
    x, t = torch.randn(8, 3, 8, 8), torch.full((8,), 0.5)
    prediction, features = denoiser.predict(x, t, torch.zeros(8, dtype=torch.long), ("enc8", "enc4", "mid"))
    assert prediction.output.abs().max() == 0
    for value in features.values():
        assert rms(value) == pytest.approx(1, abs=0.3)


def test_the_scale_of_a_weight_changes_nothing() -> None:
    network = tiny()
    x, c_noise, rows = inputs()
    before = network(x, c_noise, rows)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim:
                parameter.mul_(4.0)
    after = network(x, c_noise, rows)
    assert (after - before).norm() < 1e-2 * before.norm()  # the eps of 1e-4 is what remains
    other = tiny()
    with torch.no_grad():
        other.unet.out_gain.mul_(4.0)
    torch.testing.assert_close(other(x, c_noise, rows), 4 * before)


def test_normalising_the_weights_gives_rows_of_unit_rms_and_no_other_result() -> None:
    network = tiny()
    x, c_noise, rows = inputs()
    before = network(x, c_noise, rows)
    gains = [network.unet.out_gain.item(), network.unet.enc["8x8_block0"].emb_gain.item()]
    EDM2Denoiser(network).after_update()
    for name, parameter in network.named_parameters():
        if parameter.ndim:
            length = parameter.detach().flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(length, torch.ones_like(length), rtol=2e-3, atol=0)
            assert name.endswith("weight")
    assert gains == [network.unet.out_gain.item(), network.unet.enc["8x8_block0"].emb_gain.item()]
    assert (network(x, c_noise, rows) - before).norm() < 1e-2 * before.norm()


def test_a_graph_may_hold_several_passes_in_training_mode() -> None:
    network = tiny().train()
    x, c_noise, rows = inputs()
    weights = {name: value.clone() for name, value in network.named_parameters()}
    first, second = network(x, c_noise, rows), network(x + 1, c_noise, rows)
    (first * second).mean().backward()
    assert all(torch.equal(value, weights[name]) for name, value in network.named_parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.unet.parameters())


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    conv = MPConv(3, 2, 3).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def result(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (x, 0.7))

    assert torch.autograd.gradcheck(result, (x, conv.weight))


# ---- the denoiser ----


def test_x0_is_the_papers_formula() -> None:
    network = tiny(sigma_data=0.7, sigma_max=40.0)
    denoiser = EDM2Denoiser(network)
    sigma = torch.tensor([0.2, 40.0], dtype=torch.float64)
    s = sigma.reshape(-1, 1, 1, 1)
    x = inputs()[0] * s
    rows = torch.eye(3, dtype=torch.float64)[[1, 2]]
    raw = network(x / (s**2 + 0.49).sqrt(), sigma.log() / 4, rows)
    expected = 0.49 / (s**2 + 0.49) * x + s * 0.7 / (s**2 + 0.49).sqrt() * raw
    torch.testing.assert_close(denoiser.denoise(x, sigma, torch.tensor([1, 2])), expected, rtol=1e-9, atol=1e-9)
    assert (denoiser.schedule.t_min, denoiser.schedule.t_max, denoiser.num_classes) == (0.002, 40.0, 3)
    none = denoiser.predict(x, sigma, torch.tensor([3, 3]))[0].output
    torch.testing.assert_close(none, network(x, sigma.log() / 4))
    with pytest.raises(ArgumentError, match=r"class labels \[B\] in \[0, 3\)"):
        denoiser.denoise(x, sigma)


@pytest.mark.parametrize("chosen", ["enc8", "enc4", "mid"])
def test_features_alone_run_no_decoder(chosen: str) -> None:
    network = tiny()
    denoiser = EDM2Denoiser(network)
    x, c_noise, rows = inputs()
    t, labels = (4 * c_noise).exp(), rows.argmax(1)
    prediction, features = denoiser.predict(x, t, labels, tuple(denoiser.feature_shapes), output_grad=False)
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == denoiser.feature_shapes
    assert denoiser.feature_shapes == {"enc8": (16, 8, 8), "enc4": (32, 4, 4), "mid": (32, 4, 4)}
    assert features[chosen].requires_grad
    assert not prediction.output.requires_grad
    assert torch.equal(prediction.output, network(x, t.log() / 4, rows))
    ran: list[str] = []
    for key, module in network.unet.dec.items():
        module.register_forward_hook(lambda *_, key=key: ran.append(key))
    alone = denoiser.features(x, t, labels, (chosen,))[chosen]
    assert torch.equal(alone, features[chosen])
    assert ran == (["4x4_in0", "4x4_in1"] if chosen == "mid" else [])


def test_embeddings_stay_in_float32_in_half_precision() -> None:
    """As in the publisher's fp16 mode: noise and labels are embedded in float32, down to each block's scales."""
    network = tiny().float()
    x, c_noise, rows = (value.float() for value in inputs())
    block = network.unet.enc["8x8_block0"]
    exact = network.unet.embed(c_noise, rows, None, torch.float32)
    scales = block.emb_linear(exact, block.emb_gain)
    seen: list[torch.Tensor] = []
    block.emb_linear.register_forward_hook(lambda _module, _given, result: seen.append(result))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.unet.embed(c_noise, rows, None, torch.bfloat16), exact)
        network(x, c_noise, rows)
    assert torch.equal(seen[0], scales)
    low = network.bfloat16().unet.embed(c_noise, rows, None, torch.bfloat16)
    assert low.dtype == torch.float32
    stored = tiny().bfloat16().float()  # only the stored weights are rounded
    torch.testing.assert_close(low, stored.unet.embed(c_noise, rows, None, torch.float32))


def test_half_precision_and_autocast_stay_near() -> None:
    network = tiny().float()
    x, c_noise, rows = (value.float() for value in inputs())
    full = network(x, c_noise, rows)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, c_noise, rows)
    low = network.bfloat16()(x.bfloat16(), c_noise, rows)
    assert low.dtype == torch.bfloat16
    for output in (mixed, low):
        assert (output - full).norm() < 0.08 * full.norm()


def test_a_saved_network_loads_bit_by_bit_and_without_dropout(tmp_path: Path) -> None:
    scaling = {"latent_scale": [0.5, 1.0, 2.0], "latent_bias": [0.0, -1.0, 3.0]}
    network = tiny(dropout=0.5, label_dropout=0.1, **scaling).float()
    network.save_pretrained(tmp_path)
    denoiser = wrap(load_network(EDM2Network, tmp_path), None)
    x, c_noise, _ = (value.float() for value in inputs())
    t, labels = (4 * c_noise).exp(), torch.tensor([0, 2])
    expected = EDM2Denoiser(network.eval()).denoise(x, t, labels)
    assert torch.equal(denoiser.train().denoise(x, t, labels), expected)
    assert not torch.equal(EDM2Denoiser(network.train()).denoise(x, t, labels), expected)
    loaded = denoiser.network.state_dict()
    assert list(loaded) == list(network.state_dict())
    assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "EDM2Network"
    assert denoiser.network.config.dropout == 0.0
    assert denoiser.null_class == 3
    assert denoiser.latent_scaling == ((0.5, 1.0, 2.0), (0.0, -1.0, 3.0), (0.0, 1.0))
    same = denoiser.with_network(EDM2Network.from_config(denoiser.network.config))
    assert type(same) is EDM2Denoiser
    assert same.latent_scaling == denoiser.latent_scaling

    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_network(EDM2Network, tmp_path)


def test_published_latents_get_the_standard_deviation_of_the_data() -> None:
    scale = [0.5 / std for std in (4.17, 4.62, 3.71, 3.28)]
    bias = [-mean * factor for mean, factor in zip((5.81, 3.25, 0.12, -2.15), scale, strict=True)]
    network = on_meta(**LATENT, latent_scale=scale, latent_bias=bias)
    scaling = EDM2Denoiser(network).latent_scaling
    assert scaling is not None
    raw = torch.tensor([[5.81, 3.25, 0.12, -2.15], [5.81 + 4.17, 3.25 - 4.62, 0.12 + 3.71, -2.15 - 3.28]])
    samples = scaling.to_samples(raw[:, :, None, None]).flatten(1)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, -0.5, 0.5, -0.5]])
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-6)
    assert EDM2Denoiser(tiny()).latent_scaling is None
    assert EDM2Denoiser(tiny(label_dim=0)).num_classes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_scale": [1.0, 1.0, 1.0]}, "expected 3 numbers each"),
        ({"latent_scale": [1.0, 1.0], "latent_bias": [1.0, 1.0]}, "expected 3 numbers each"),
        ({"channels_per_head": 24}, "expected a multiple of channels_per_head = 24"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        EDM2Network(**(TINY | changes))

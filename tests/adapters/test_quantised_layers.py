"""Frozen weights in 8 or 4 bits: which layers, how exact, and as differentiable as the weights that the bits say."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdistill.adapters import wrap
from fdistill.adapters.quantised_layers import (
    KINDS,
    QuantisedConv2d,
    QuantisedLinear,
    quantise,
    quantised_names,
    restore,
)
from fdistill.base.errors import ConfigError
from fdistill.denoiser import Denoiser
from fdistill.students.lora import lora_copy, merged
from fdistill.training.activation_checkpointing import checkpoint_activations
from support.activations import kept_bytes
from support.denoisers import tiny_unet
from support.extras import needs_bitsandbytes

CPU = torch.device("cpu")
#: Root mean square of what a weight drawn from a normal distribution loses, as a share of it. Steps of 1/127 of the
#: largest of 256, which is 2.8 deviations, have 2.8 / 127 / sqrt(12); 3 bits of mantissa have 2^-4 / sqrt(3) at most,
#: and 0.7 of that on average; NormalFloat has 0.092 (measured).
LOST = {"int8": 0.0064, "fp8": 0.025, "nf4": 0.092}
BITS = {"int8": 8 + 32 / 256, "fp8": 8 + 32 / 256, "nf4": 4 + 32 / 64}

kinds = pytest.mark.parametrize("kind", KINDS)


def network() -> Denoiser:
    """A UNet with attention, on 8 x 8 pixels, frozen, with weights in bf16."""
    torch.manual_seed(0)
    unet = tiny_unet(num_class_embeds=None)
    denoiser = wrap(unet, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    return denoiser.requires_grad_(False).to(torch.bfloat16)


def x0(denoiser: Denoiser, x_t: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return denoiser.denoise(x_t, torch.full((len(x_t),), 500.0), None)


def noise(requires_grad: bool = False) -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


@needs_bitsandbytes
def test_the_layers_of_blocks_are_stored_and_no_others() -> None:
    denoiser = network()
    names = set(quantised_names(denoiser))
    layers = {name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert {name.removeprefix("network.") for name in layers - names} == {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }
    assert {"network.mid_block.attentions.0.to_q", "network.down_blocks.0.resnets.0.conv1"} <= names
    before = {name: value.dtype for name, value in denoiser.named_parameters()}
    quantise(denoiser, "nf4", CPU)
    for name, value in denoiser.named_parameters():
        stored = name.rpartition(".")[0] in names and name.endswith(".weight")
        assert value.dtype == (torch.uint8 if stored else before[name]), name


@needs_bitsandbytes
@kinds
def test_a_weight_loses_what_its_bits_cannot_say(kind: str) -> None:
    layer = nn.ModuleDict({"blocks": nn.Linear(256, 300, bias=False)})
    weight = nn.init.normal_(layer["blocks"].weight, generator=torch.Generator().manual_seed(0)).detach().clone()
    quantise(layer, kind, CPU)
    stored = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert stored == weight.numel() * BITS[kind] / 8
    restore(layer)
    assert type(layer["blocks"]) is nn.Linear
    lost = float((layer["blocks"].weight - weight).norm() / weight.norm())
    assert lost == pytest.approx(LOST[kind], rel=0.1)


@needs_bitsandbytes
@kinds
@pytest.mark.parametrize(
    "layer", [nn.Linear(24, 16), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1, groups=2)]
)
def test_derivatives_are_those_of_the_weight_that_the_bits_say(kind: str, layer: nn.Module) -> None:
    """The first and the second, in float32 and in autocast."""
    stored = nn.ModuleDict({"blocks": copy.deepcopy(layer)}).requires_grad_(False)
    quantise(stored, kind, CPU)
    plain = copy.deepcopy(stored)
    restore(plain)
    assert isinstance(stored["blocks"], (QuantisedLinear, QuantisedConv2d))
    shape = (3, 24) if isinstance(layer, nn.Linear) else (3, 4, 5, 5)
    for bf16 in (False, True):
        found = []
        for holder in (stored, plain):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = holder["blocks"](x)
            (first,) = torch.autograd.grad(y.float().pow(3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            found.append((y.float(), first, second))
        for own, expected in zip(*found, strict=True):
            close = (
                {"rtol": 2e-2, "atol": 2e-2 * float(expected.detach().abs().max())}
                if bf16
                else {"rtol": 1e-4, "atol": 1e-5}
            )
            torch.testing.assert_close(own, expected, **close)


@needs_bitsandbytes
@kinds
def test_adapters_learn_on_stored_weights_and_are_merged_into_what_they_say(kind: str) -> None:
    """With activation checkpointing too; nothing of the size of the weights is kept for the backward pass."""
    denoiser = network()
    quantise(denoiser, kind, CPU)
    student = lora_copy(denoiser, 2, adapter="student").train()
    base = {p.data_ptr() for p in denoiser.parameters()}
    assert base <= {p.data_ptr() for p in student.parameters()}
    trained = [p for p in student.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    result = x0(student, noise())
    gradients = torch.autograd.grad(result.square().sum(), trained)
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients)
    whole = merged(student)
    assert not any(isinstance(module, (QuantisedLinear, QuantisedConv2d)) for module in whole.modules())
    torch.testing.assert_close(x0(whole, noise()), result.detach(), rtol=0, atol=0.05)
    checkpoint_activations(student)
    again = torch.autograd.grad(x0(student, noise()).square().sum(), trained)
    for own, expected in zip(again, gradients, strict=True):
        torch.testing.assert_close(own, expected)


@needs_bitsandbytes
def test_no_copy_of_a_weight_is_kept_for_the_backward_pass() -> None:
    """Of a layer whose weight is far larger than what it computes."""
    layer = nn.ModuleDict({"blocks": nn.Linear(512, 512)}).requires_grad_(False)
    quantise(layer, "nf4", CPU)

    def evaluated() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.gelu(layer["blocks"](torch.ones(2, 512, requires_grad=True)))

    assert kept_bytes(layer, evaluated)[0] < 512 * 512 / 10


@needs_bitsandbytes
def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"no torch.nn.Linear or Conv2d layers in its blocks .* expected bf16 or fp32"
    ):
        quantise(nn.Linear(2, 2), "int8", CPU)


def test_without_bitsandbytes_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def missing(name: str, *arguments: Any) -> Any:
        return None if name == "bitsandbytes" else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ConfigError, match=r"nf4 needs bitsandbytes, .*pip install 'fdistill\[quantised\]'.*=bf16"):
        quantise(network(), "nf4", CPU)

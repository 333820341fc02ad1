"""Linear and convolutional layers whose frozen weights are stored in 8 or 4 bits, by bitsandbytes.

A layer computes with its weight in the precision of autocast, or of its input, and makes it from the stored one
whenever it runs, forward or backward, so that no copy of the weight outlives the layer's own computation. Which layers
these are is `quantised_names`'s to say.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from fdistill.base.errors import ConfigError


class _Kind(NamedTuple):
    """The numbers that a weight is rounded to, and how many of them share a scale in float32."""

    name: str
    block: int


#: Numbers of 8 bits in equal steps, of 8 bits with 4 for the exponent and 3 for the mantissa (E4M3), and of 4 bits at
#: the quantiles of a normal distribution (NormalFloat, arXiv 2305.14314).
KINDS = {kind.name: kind for kind in (_Kind("int8", 256), _Kind("fp8", 256), _Kind("nf4", 64))}


def quantised_names(network: nn.Module) -> list[str]:
    """Names of the layers that `quantise` changes: the linear and convolutional ones inside the network's blocks.

    First and last layers, embeddings and what else stands outside of the blocks keep their precision, and so do norms
    and layers of a class of their own, as those that compute in float32 are.
    """
    return [name for name, module in network.named_modules() if _in_a_block(name) and _is_plain(module)]


#: Names of blocks, and of lists of them, that do not end in "blocks".
_BLOCKS = {"mid_block", "layers", "noise_refiner", "context_refiner"}


def _in_a_block(name: str) -> bool:
    return any(part.endswith("blocks") or part in _BLOCKS for part in name.split("."))


def _is_plain(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def place(network: nn.Module, precision: str, device: torch.device) -> None:
    """Moves a frozen network to the device in a `frozen_precision`, in place.

    Args:
        precision: "fp32" leaves the weights as they are; "bf16" is for all of them; one of KINDS is for the layers in
            the blocks, beside bf16. Raises what `quantise` does.
    """
    if precision != "fp32":
        network.to(torch.bfloat16)
    if precision in KINDS:
        quantise(network, precision, device)
    network.to(device)


def quantise(network: nn.Module, kind: str, device: torch.device) -> None:
    """Stores the weights of the blocks' layers in one of KINDS, in place, and moves these layers to the device.

    They are moved one after the other, so that the device never holds the network in its precision from before.

    Args:
        network: frozen.
        kind: "int8", "fp8" or "nf4".

    Raises:
        ConfigError: bitsandbytes is not installed, or the network has no layer to quantise.
    """
    check_installed(kind)
    names = quantised_names(network)
    if not names:
        raise ConfigError(
            f"frozen_precision: got {kind}, but this network has no torch.nn.Linear or Conv2d layers in its blocks "
            "(those of EDM and EDM2 have layer classes of their own); expected bf16 or fp32"
        )
    for name in names:
        layer: Any = network.get_submodule(name).to(device)
        _store(layer, KINDS[kind])
        layer.__class__ = _CLASSES[type(layer)]


def check_installed(kind: str) -> None:
    """Raises ConfigError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"frozen_precision: {kind} needs bitsandbytes, which is not installed; run "
            "`pip install 'fdistill[quantised]'`, or set frozen_precision=bf16"
        )


def restore(network: nn.Module) -> None:
    """Makes layers as they were of those that `quantise` changed, with float32 weights, in place."""
    for module in network.modules():
        if isinstance(module, (QuantisedLinear, QuantisedConv2d)) and module.stored is not None:
            layer: Any = module
            weight = nn.Parameter(_weight(layer, torch.float32), requires_grad=False)
            layer.__class__ = next(plain for plain, stored in _CLASSES.items() if stored is type(layer))
            layer.weight = weight
            del layer.scales, layer.stored


@lru_cache
def numbers(kind: str, device: torch.device) -> Tensor:
    """The numbers in [-1, 1] that "int8" or "fp8" has, float32 [256], ascending; made once for a device."""
    from bitsandbytes import functional

    made: Tensor = functional.create_linear_map() if kind == "int8" else functional.create_fp8_map(True, 4, 3)
    return made.to(device)


def encode(weight: Tensor, kind: _Kind) -> tuple[Tensor, Tensor]:
    """A float32 weight as (codes uint8: its shape, or two numbers in a byte for nf4; scales float32 [blocks])."""
    from bitsandbytes import functional

    if kind.name == "nf4":
        codes, state = functional.quantize_4bit(weight.reshape(1, -1), blocksize=kind.block, quant_type="nf4")
    else:
        codes, state = functional.quantize_blockwise(weight, numbers(kind.name, weight.device), blocksize=kind.block)
    return codes, state.absmax


def decode(codes: Tensor, scales: Tensor, kind: _Kind, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that `encode` was given, rounded."""
    from bitsandbytes import functional

    settings = {"absmax": scales, "blocksize": kind.block, "dtype": dtype}
    if kind.name == "nf4":
        flat = torch.Size([1, shape.numel()])
        state = functional.QuantState(**settings, shape=flat, quant_type="nf4")
        weight: Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    else:
        state = functional.QuantState(**settings, code=numbers(kind.name, codes.device))
        weight = functional.dequantize_blockwise(codes, state)
    return weight.reshape(shape)


def _store(layer: Any, kind: _Kind) -> None:
    weight = layer.weight.detach().float().contiguous()
    codes, scales = encode(weight, kind)
    if codes.shape != weight.shape:
        codes = codes.reshape(-1, *[1] * (weight.dim() - 1))  # as many dimensions as peft tells convolutions by
    layer.stored = (kind.name, weight.shape)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.register_buffer("scales", scales, persistent=False)


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a quantised layer, in its own shape."""
    name, shape = layer.stored
    return decode(layer.weight, layer.scales, KINDS[name], shape, dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Linear(torch.autograd.Function):
    """x W^T + b, which keeps neither x nor W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, _weight(layer, x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _weight(ctx.layer, grad.dtype), None


class _Conv2d(torch.autograd.Function):
    """A convolution of x, which keeps neither x nor the weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.conv2d(x, _weight(layer, x.dtype), bias, *_settings(layer))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = _weight(ctx.layer, grad.dtype)
        return conv2d_input(ctx.shape, weight, grad, *_settings(ctx.layer)), None


def _settings(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.stride, layer.padding, layer.dilation, layer.groups


class QuantisedLinear(nn.Linear):
    """A linear layer whose frozen weight `quantise` stored; its bias is in the network's precision.

    Attributes:
        stored: one of KINDS, and the shape of the weight; None for an ordinary layer, as adapters of this layer are:
            peft makes them of the class of what they adapt.
    """

    stored: tuple[str, torch.Size] | None = None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) if self.stored is None else _Linear.apply(x.to(_computed_in(x)), self)
        return result


class QuantisedConv2d(nn.Conv2d):
    """A convolution whose frozen weight `quantise` stored; otherwise as QuantisedLinear."""

    stored: tuple[str, torch.Size] | None = None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) if self.stored is None else _Conv2d.apply(x.to(_computed_in(x)), self)
        return result


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QuantisedLinear, nn.Conv2d: QuantisedConv2d}

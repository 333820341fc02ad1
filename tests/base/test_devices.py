"""Precision is what docs/recipes.md says: fdistill changes no setting of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fdistill.base import devices
from fdistill.base.devices import autocast

_CODE = """
import torch
import fdistill.training.loop
from fdistill.base.devices import autocast, start
state, device = start("cpu")
with autocast(device, "fp32"):
    print(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu"))
"""


@pytest.mark.parametrize(("override", "products"), [(None, "False"), ("1", "True")])
@pytest.mark.thorough
def test_float32_multiplies_by_tensor_float_32_in_convolutions_alone(override: str | None, products: str) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"}
    if override is not None:
        variables["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = override
    done = subprocess.run([sys.executable, "-c", _CODE], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", products, "False"]


@pytest.mark.parametrize("instructions", [True, False])
def test_a_weight_learns_in_bf16_after_a_pass_without_gradients(
    instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "computes_bfloat16", lambda: instructions)
    layer = torch.nn.Linear(4, 4)
    with autocast(torch.device("cpu"), "bf16"):
        with torch.no_grad():
            layer(torch.ones(1, 4))
        output = layer(torch.ones(1, 4))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


_A, _B = torch.randn(6, 16), torch.randn(16, 16)
_IMAGES, _KERNEL = torch.randn(2, 8, 9, 9), torch.randn(4, 8, 3, 3)
PRODUCTS: dict[str, tuple[Any, list[torch.Tensor]]] = {
    "linear": (F.linear, [_A, _B, torch.randn(16)]),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), [_IMAGES, _KERNEL]),
    "matrix product": (lambda a, b: a @ b, [_A, _B]),
    "einsum": (lambda a, b: torch.einsum("nk,kc->nc", a, b), [_A, _B]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_cpu_without_bfloat16_rounds_as_one_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and results are rounded to bfloat16, and sums are not; in the backward pass as well."""
    monkeypatch.setattr(devices, "computes_bfloat16", lambda: False)
    function, given = PRODUCTS[name]
    inputs = [value.clone().requires_grad_() for value in given]
    with autocast(torch.device("cpu"), "bf16"):
        output = function(*inputs)
    assert output.dtype == torch.bfloat16
    exact = [value.bfloat16().double().requires_grad_() for value in given]
    expected = function(*exact)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)
    assert torch.equal(output, expected.bfloat16()) or (output != expected.bfloat16()).float().mean() < 0.02
    direction = torch.randn_like(output)
    output.backward(direction)
    expected.backward(direction.double())
    for value, wanted in zip(inputs, exact, strict=True):
        assert value.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(value.grad.double(), wanted.grad, rtol=2**-7, atol=1e-2)


def test_products_of_other_types_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "computes_bfloat16", lambda: False)
    with autocast(torch.device("cpu"), "bf16"):
        assert F.linear(_A.double(), _B.double()).dtype == torch.float64
        assert torch.equal(torch.tensor([[257]]) @ torch.tensor([[1]]), torch.tensor([[257]]))
        with devices.without_autocast(torch.device("cpu")):
            assert torch.equal(F.linear(_A, _B), torch.nn.Linear.forward(_layer(), _A))
    with autocast(torch.device("cpu"), "fp32"):
        assert F.linear(_A, _B).dtype == torch.float32


def _layer() -> torch.nn.Linear:
    layer = torch.nn.Linear(16, 16, bias=False)
    layer.weight.data.copy_(_B)
    return layer

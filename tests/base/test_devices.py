"""Precision is what docs/recipes.md says: fdistill changes no setting of torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

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
def test_float32_multiplies_by_tensor_float_32_in_convolutions_alone(override: str | None, products: str) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"}
    if override is not None:
        variables["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = override
    done = subprocess.run([sys.executable, "-c", _CODE], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", products, "False"]


def test_a_weight_learns_in_bf16_after_a_pass_without_gradients() -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(torch.device("cpu"), "bf16"):
        with torch.no_grad():
            layer(torch.ones(1, 4))
        output = layer(torch.ones(1, 4))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0

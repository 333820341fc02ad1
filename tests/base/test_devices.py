"""Precision is what docs/recipes.md says: fdistill changes no setting of torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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

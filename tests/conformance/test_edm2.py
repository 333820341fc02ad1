"""EDM2's network against outputs of an implementation that others wrote from the paper (see record_edm2.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fdistill.adapters.checkpoint import load_teacher
from fdistill.networks import EDM2Network
from support.tolerances import assert_rounded

ARRAYS = Path(__file__).parent / "arrays"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = EDM2Network(
        16,
        3,
        10,
        model_channels=32,
        channel_mult=[1, 1],
        channel_mult_emb=4,
        num_blocks=1,
        attn_resolutions=[8],
        channels_per_head=16,
    )
    recorded = {name: value.float() for name, value in load_file(ARRAYS / "edm2.safetensors").items()}
    uncertainty = {name: value for name, value in network.state_dict().items() if name.startswith("logvar")}
    network.load_state_dict({**recorded, **uncertainty})
    network.save_pretrained(target := tmp_path_factory.mktemp("teachers") / "edm2")
    return target


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 5.0, 80.0])
def test_x0_is_that_of_another_implementation(folder: Path, sigma: float) -> None:
    teacher = load_teacher(folder)
    arrays = {key: torch.from_numpy(value) for key, value in np.load(ARRAYS / "edm2.npz").items()}
    x_t, t = arrays["x0"] + sigma * arrays["eps"], torch.full((2,), sigma)
    with torch.no_grad():
        prediction, _ = teacher.predict(teacher.network_input(x_t, t), t, arrays["labels"], ())
    assert prediction is not None
    assert_rounded(prediction.x0(x_t), arrays[f"denoised_{sigma}"])
    assert arrays[f"output_{sigma}"].std() > 0.1
    assert_rounded(prediction.output, arrays[f"output_{sigma}"])

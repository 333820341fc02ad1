"""EDM's three architectures against outputs of NVIDIA's own code (nvidia-physicsnemo; see record_edm.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fdistill.adapters.checkpoint import load_teacher
from fdistill.networks import EDMNetwork
from support.tolerances import assert_rounded

ARRAYS = Path(__file__).parent / "arrays"
_SMALL: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
NETWORKS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"model_type": "SongUNet", "label_dim": 10, "augment_dim": 9, **_SMALL},
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "augment_dim": 9,
        **_SMALL,
    },
    "adm": {"model_type": "DhariwalUNet", "label_dim": 10, **_SMALL, "model_channels": 32},
}


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 5.0, 80.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_x0_is_that_of_nvidias_code(name: str, sigma: float, tmp_path: Path) -> None:
    network = EDMNetwork(img_resolution=16, img_channels=3, **NETWORKS[name])
    network.load_state_dict(
        {key: value.float() for key, value in load_file(ARRAYS / f"edm-{name}.safetensors").items()}
    )
    network.save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher")
    arrays = {key: torch.from_numpy(value) for key, value in np.load(ARRAYS / f"edm-{name}.npz").items()}
    labels = arrays["labels"] if teacher.num_classes else None
    with torch.no_grad():
        found = teacher(arrays["x0"] + sigma * arrays["eps"], torch.full((2,), sigma), labels)
    assert_rounded(found, arrays[f"denoised_{sigma}"])
    # At the least noise x0 is almost x_t: what the network adds is compared by itself.
    form = teacher.preconditioning(torch.full((2,), sigma))
    assert form.skip is not None
    kept = form.skip[0] * (arrays["x0"] + sigma * arrays["eps"])
    # Each x0 has itself been rounded, to a part in 2^24.
    added, rounding = arrays[f"denoised_{sigma}"] - kept, 2**-23 * kept.abs().max().item()
    torch.testing.assert_close(found - kept, added, rtol=0, atol=1e-4 * added.abs().max().item() + rounding)

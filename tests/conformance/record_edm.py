"""Records what NVIDIA's own EDM networks compute, for test_edm.py. Needs nvidia-physicsnemo 1.3 (Apache-2.0).

python tests/conformance/record_edm.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from physicsnemo.models.diffusion import EDMPrecond  # type: ignore[import-not-found,unused-ignore]
from safetensors.torch import save_file

ARRAYS = Path(__file__).parent / "arrays"
_SMALL: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
#: The three published architectures (arXiv 2206.00364, table 1), with few channels.
NETWORKS: dict[str, dict[str, Any]] = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "augment_dim": 9,
        "label_dim": 10,
        **_SMALL,
    },
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "augment_dim": 9,
        "label_dim": 0,
        **_SMALL,
    },
    "adm": {"model_type": "DhariwalUNet", "label_dim": 10, "augment_dim": 0, **_SMALL, "model_channels": 32},
}
SIGMAS = (0.002, 0.05, 0.5, 5.0, 80.0)


def published(name: str) -> str:
    """The name of a tensor in EDM's own files, where attention is part of its block."""
    return name.replace("attn.norm.", "norm2.").replace("attn.qkv.", "qkv.").replace("attn.proj.", "proj.")


def main() -> None:
    for name, settings in NETWORKS.items():
        torch.manual_seed(0)
        network = EDMPrecond(img_resolution=16, img_channels=3, sigma_data=0.5, dropout=0.0, **settings)
        network.train()  # in eval mode its group norm divides by n - 1 instead of n, unlike EDM's and torch's
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():  # zero-initialised layers would hide what is before them
                    parameter.normal_(std=0.1)
                parameter.copy_(parameter.half())
        tensors = {published(key): value for key, value in network.state_dict().items() if "device_buffer" not in key}
        halves = {}
        for key, value in tensors.items():
            halves[key] = value.half() if torch.equal(value.half().float(), value) else value
        save_file(halves, ARRAYS / f"edm-{name}.safetensors")
        x0, eps = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16)
        labels = torch.tensor([3, 7])
        rows = torch.nn.functional.one_hot(labels, 10).float() if settings["label_dim"] else None
        found = {"x0": x0.numpy(), "eps": eps.numpy(), "labels": labels.numpy()}
        with torch.no_grad():
            for sigma in SIGMAS:
                found[f"denoised_{sigma}"] = network(
                    x0 + sigma * eps, torch.full((2,), sigma), class_labels=rows
                ).numpy()
        np.savez_compressed(ARRAYS / f"edm-{name}.npz", **found)
        print(name, sum(value.numel() for value in tensors.values()), sorted(tensors)[:3])


if __name__ == "__main__":
    main()

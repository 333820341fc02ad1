"""Records what another implementation of EDM2's network computes, for test_edm2.py.

The implementation is `KarrasUnet` of denoising-diffusion-pytorch 2.3 (MIT), written from the paper by others. Where it
departs from the paper (Karras et al. 2023, arXiv 2312.02696) and from the published networks, `as_published` says so.

python tests/conformance/record_edm2.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import karras_unet  # type: ignore[import-not-found,unused-ignore]
from safetensors.torch import save_file
from torch import Tensor, nn

ARRAYS = Path(__file__).parent / "arrays"
CHANNELS, HEAD, CLASSES = 32, 16, 10
SIGMAS = (0.002, 0.05, 0.5, 5.0, 80.0)
#: The blocks in the order in which they run, by their published names; all at 8x8 but in1 and down have attention.
ENCODER = ("16x16_block0", "8x8_down", "8x8_block0")
DECODER = ("8x8_in0", "8x8_in1", "8x8_block0", "8x8_block1", "16x16_up", "16x16_block0", "16x16_block1")
ATTENTION = ("enc.8x8_block0", "dec.8x8_in0", "dec.8x8_block0", "dec.8x8_block1")


def as_published(network: Any) -> dict[str, Any]:
    """Changes the network to that of the paper's configuration G. Returns its blocks by their published names."""

    def normalized(x: Tensor, dim: int = -1, eps: float = 1e-4) -> Tensor:
        return x / (x.norm(dim=dim, keepdim=True) + eps * math.sqrt(x.shape[dim]))  # the paper adds eps to the rms

    def resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
        return F.interpolate(x, size, mode="nearest" if size[0] > x.shape[-1] else mode)  # up by the filter [1, 1]

    karras_unet.l2norm = normalized
    karras_unet.F = type("functional", (), {**vars(F), "interpolate": staticmethod(resized)})
    network.input_block.fan_in = 4 * 9  # counts the channel of ones
    blocks = dict(zip([f"enc.{name}" for name in ENCODER], network.downs, strict=True))
    blocks |= zip([f"dec.{name}" for name in DECODER], [*network.mids, *network.ups], strict=True)
    blocks["enc.8x8_down"].downsample_conv = nn.Identity()  # no convolution where channels stay the same
    for name in ATTENTION:
        attention = karras_unet.Attention(CHANNELS, CHANNELS // HEAD, HEAD, num_mem_kv=0, mp_add_t=0.7)
        blocks[name].attn = attention
    for block in blocks.values():
        block.res_mp_add.t = 0.7  # its first argument is the branch, the paper's is the shortcut, with t = 0.3
    return blocks


def published_tensors(network: Any, blocks: dict[str, Any]) -> dict[str, Tensor]:
    """The network's tensors under the names, and in the order of rows, of published files."""
    frequencies = 2 * math.pi * network.to_time_emb[0].weights
    first = network.input_block.weight
    found = {
        "emb_fourier.freqs": torch.cat([frequencies, frequencies]),  # sines, then cosines
        "emb_fourier.phases": torch.cat([torch.full_like(frequencies, -math.pi / 2), torch.zeros_like(frequencies)]),
        "emb_noise.weight": network.to_time_emb[1].weight,
        "emb_label.weight": network.to_class_emb.weight,
        "enc.16x16_conv.weight": torch.cat([first[:, 1:], first[:, :1]], dim=1),  # ones come last
        "out_conv.weight": network.output_block[0].weight,
        "out_gain": network.output_block[1].gain,
    }
    for name, block in blocks.items():
        found[f"{name}.emb_gain"] = block.to_emb[1].gain
        found[f"{name}.emb_linear.weight"] = block.to_emb[0].weight
        found[f"{name}.conv_res0.weight"] = block.block1[1].weight
        found[f"{name}.conv_res1.weight"] = block.block2[2].weight
        if getattr(block, "res_conv", None) is not None and not isinstance(block.res_conv, nn.Identity):
            found[f"{name}.conv_skip.weight"] = block.res_conv.weight
        if block.attn is not None:
            qkv = block.attn.to_qkv.weight.unflatten(0, (3, CHANNELS // HEAD, HEAD))
            found[f"{name}.attn_qkv.weight"] = qkv.permute(1, 2, 0, 3, 4, 5).flatten(0, 2)  # q, k, v side by side
            found[f"{name}.attn_proj.weight"] = block.attn.to_out.weight
    return {f"unet.{name}": value.detach().contiguous() for name, value in found.items()}


def main() -> None:
    torch.manual_seed(0)
    network = karras_unet.KarrasUnet(
        image_size=16,
        channels=3,
        dim=CHANNELS,
        dim_max=CHANNELS,
        num_classes=CLASSES,
        num_downsamples=1,
        num_blocks_per_stage=1,
        attn_res=(),
        fourier_dim=CHANNELS,
        dropout=0.0,
    )
    blocks = as_published(network)
    network.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.ndim:
                parameter.normal_()  # gains of 0 would hide what is before them
            parameter.copy_(parameter.half())
    network.to_time_emb[0].weights.requires_grad_(False)
    x0, eps = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16)
    labels = torch.tensor([3, 7])
    found = {"x0": x0.numpy(), "eps": eps.numpy(), "labels": labels.numpy()}
    with torch.no_grad():
        for sigma in SIGMAS:
            x_t = x0 + sigma * eps
            length = math.hypot(sigma, 0.5)
            output = network(x_t / length, torch.full((2,), math.log(sigma) / 4), class_labels=labels)
            denoised = x_t * (0.5 / length) ** 2 + output * sigma * 0.5 / length  # EDM's table 1, sigma_data = 0.5
            found[f"output_{sigma}"], found[f"denoised_{sigma}"] = output.numpy(), denoised.numpy()
        tensors = published_tensors(network, blocks)
    stored = {name: value if "fourier" in name else value.half() for name, value in tensors.items()}
    save_file(stored, ARRAYS / "edm2.safetensors")
    np.savez_compressed(ARRAYS / "edm2.npz", **found)  # type: ignore[arg-type]
    print(sum(value.numel() for value in tensors.values()), "numbers;", found["output_0.5"].std(), "std of an output")


if __name__ == "__main__":
    main()

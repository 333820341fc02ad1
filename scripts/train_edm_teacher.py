"""Train a small class-conditional EDM teacher (DDPM++) on images in an .npz file, for as many minutes as there are.

    python scripts/train_edm_teacher.py DATA.npz --output DIR [--minutes 8]

Loss and noise levels of Karras et al. 2022 (arXiv 2206.00364, table 1); no augmentation, no dropout. How many
iterations there is time for is measured at the start, so that learning rate and averaging know their end. A teacher for
comparing methods on one machine; it is far from the published ones.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from fdistill.adapters.edm import EDMDenoiser
from fdistill.base.devices import autocast, start
from fdistill.base.files import replaced_folder
from fdistill.base.images import to_unit
from fdistill.data.npz import open_npz
from fdistill.ema import EMA
from fdistill.losses import denoising_loss, denoising_weight
from fdistill.networks import EDMNetwork
from fdistill.noise import add_noise, lognormal_levels

SEED, LEARNING_RATE, WARM_UP_IMAGES, EMA_OF_RUN = 0, 1e-3, 100_000, 0.01


def build(size: int, classes: int, channels: int) -> EDMDenoiser:
    """DDPM++ of half the published depth, resolutions down to 8, attention at 16 (at 8 where that is all)."""
    levels = int(math.log2(size // 8)) + 1
    network = EDMNetwork(
        model_type="SongUNet",
        img_resolution=size,
        label_dim=classes,
        model_channels=channels,
        channel_mult=[1, *[2] * (levels - 1)],
        num_blocks=2,
        attn_resolutions=[16 if size > 16 else 8],
        dropout=0.0,
    )
    return EDMDenoiser(network)


def train(
    denoiser: EDMDenoiser,
    images: Tensor,
    labels: Tensor,
    *,
    seconds: float = 0.0,
    iterations: int | None = None,
    batch_size: int,
    compiled: bool = False,
) -> dict[str, Any]:
    """Trains for about `seconds`, or so many iterations, and leaves the averaged weights in the denoiser.

    Args:
        denoiser: on the device to train on.
        images, labels: uint8 [N, C, H, W] and int64 [N], on the same device.
        iterations: None finds out how many there is time for; a number makes the same teacher on every machine.
        compiled: run the network through torch.compile.

    Returns:
        iterations, seconds, images_per_second, and the loss now and then.
    """
    device = images.device
    network: Any = torch.compile(denoiser) if compiled else denoiser
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), fused=True)
    random = torch.Generator(device).manual_seed(SEED)

    def step(rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(images), (batch_size,), generator=random, device=device)
        x0 = to_unit(images[rows])
        t = lognormal_levels(denoiser.schedule, torch.rand(batch_size, generator=random, device=device))
        noise = torch.randn(x0.shape, generator=random, device=device)
        with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
            prediction = network(add_noise(denoiser.schedule, x0, noise, t), t, labels[rows])
        weight = denoising_weight("edm", torch.ones_like(t), t, sigma_data=denoiser.sigma_data)
        loss = denoising_loss(prediction, x0, weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    began = time.perf_counter()
    if iterations is None:
        each = _seconds_each(lambda: step(1e-6), device)  # a rate at which nothing moves
        iterations = max(10, int((seconds - (time.perf_counter() - began)) / each))
    ema = EMA(denoiser, [max(0.5, 1 - 1 / max(2.0, EMA_OF_RUN * iterations))])
    warm_up, losses, kept = max(1, WARM_UP_IMAGES // batch_size), [], []
    for i in trange(iterations, desc="teacher", unit="it", mininterval=5):
        rate = LEARNING_RATE * min(1.0, (i + 1) / min(warm_up, iterations / 5))
        kept.append(step(rate * (0.5 + 0.5 * math.cos(math.pi * i / iterations))))
        ema.update()
        if len(kept) == max(1, iterations // 50):
            losses.append(torch.stack(kept).mean().item())
            kept.clear()
    denoiser.load_state_dict(ema.shadows[ema.decays[0]])
    spent = time.perf_counter() - began
    return {
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "iterations": iterations,
        "batch_size": batch_size,
        "seconds": spent,
        "images_per_second": iterations * batch_size / spent,
        "losses": losses,
    }


def _seconds_each(step: Any, device: torch.device, count: int = 10) -> float:
    """Seconds of a step, after a few to warm up."""
    for measured in (False, True):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count if measured else 3):
            step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def make(data: Path, output: Path, *, minutes: float, batch_size: int, channels: int, compiled: bool) -> dict[str, Any]:
    """Trains on the images of `data` and writes the teacher folder `output`; what `train` says of it."""
    _, device = start("auto")
    torch.manual_seed(SEED)
    source = open_npz(data)
    denoiser = build(source.images.shape[-1], source.num_classes or 0, channels).to(device)
    if device.type == "cuda":
        denoiser.to(memory_format=torch.channels_last)
    facts = train(
        denoiser,
        source.images.to(device),
        source.labels.to(device),
        seconds=60 * minutes,
        batch_size=batch_size,
        compiled=compiled,
    )
    denoiser.cpu().to(memory_format=torch.contiguous_format)
    with replaced_folder(output) as folder:
        denoiser.network.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--compile", dest="compiled", action="store_true", help="torch.compile the network")
    options = vars(parser.parse_args())
    facts = make(options.pop("data"), options.pop("output"), **options)
    print(json.dumps({key: value for key, value in facts.items() if key != "losses"}))


if __name__ == "__main__":
    main()

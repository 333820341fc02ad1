"""Train the embedded digits teacher (fdistill/assets/digits-teacher): fixed seed, minutes on 2 CPU cores.

    python scripts/train_digits_teacher.py [OUTPUT_DIR] [--iterations N]

A class-conditional UNet2DModel with the preconditioning of EDM in the form of consistency models, so that plain
diffusers can run a student of it. Prints the Frechet distance in digit features of 1,797 samples at 35 evaluations
each.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from tqdm import trange

from evaluation.extractors.digit_features import extract, load_digit_features
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.moments import Moments
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.unet2d import UNet2DDenoiser, wrap
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.images import to_uint8, to_unit
from fdistill.data.digits import load_digits
from fdistill.ema import EMA
from fdistill.noise import add_noise, lognormal_levels
from fdistill.sampler import evaluations, heun_sample

SEED, BATCH, LEARNING_RATE, WARM_UP, EMA_DECAY, SIGMA_DATA, HEUN_STEPS = 0, 128, 2e-3, 100, 0.998, 0.75, 18


def build() -> tuple[UNet2DDenoiser, CMStochasticIterativeScheduler]:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=64,
        num_class_embeds=10,
    )
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA)
    return wrap(unet, scheduler_config(scheduler)), scheduler


def train(denoiser: UNet2DDenoiser, iterations: int) -> EMA:
    images, labels = load_digits()
    x = to_unit(images)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    ema = EMA(denoiser, [EMA_DECAY])
    for step in trange(iterations, desc="teacher", unit="it", mininterval=5):
        progress = step / iterations
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(x), (BATCH,))
        t = lognormal_levels(denoiser.schedule, torch.rand(BATCH), mean=-0.8, std=1.2)
        x0 = x[rows]
        prediction = denoiser(add_noise(denoiser.schedule, x0, torch.randn_like(x0), t), t, labels[rows])
        weight = 1 / SIGMA_DATA**2 + 1 / t**2
        loss = (weight * (prediction - x0).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 5.0)
        optimizer.step()
        ema.update()
    return ema


def score(denoiser: UNet2DDenoiser) -> tuple[float, float, float]:
    """(Frechet distance in digit features, class accuracy, images per second) of the teacher's own samples."""
    images, _ = load_digits()
    labels = torch.arange(len(images)) % 10
    noise = torch.randn(len(images), 1, 8, 8)
    start = time.perf_counter()
    samples = torch.cat(
        [heun_sample(denoiser, z, y, HEUN_STEPS) for z, y in zip(noise.split(256), labels.split(256), strict=True)]
    )
    seconds = time.perf_counter() - start
    network = load_digit_features()
    features, classes = extract(network, to_uint8(samples))
    distance = frechet_distance(Moments.of(features), Moments.of(extract(network, images)[0]))
    return distance, (classes == labels).double().mean().item(), len(images) / seconds


@torch.no_grad()
def nearest_neighbours(denoiser: UNet2DDenoiser) -> tuple[float, float]:
    """Median distance of 400 samples to their nearest training image, and of training images to the nearest other.

    Euclidean, over pixels in [-1, 1]. A teacher that memorises has the first number below the second.
    """
    x = to_unit(load_digits()[0]).flatten(1)
    samples = heun_sample(denoiser, torch.randn(400, 1, 8, 8), torch.arange(400) % 10, HEUN_STEPS).clamp(-1, 1)
    among = torch.cdist(x, x).fill_diagonal_(math.inf)
    return torch.cdist(samples.flatten(1), x).amin(1).median().item(), among.amin(1).median().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=EMBEDDED_TEACHERS["digits"])
    parser.add_argument("--iterations", type=int, default=1500)
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    denoiser, scheduler = build()
    start = time.perf_counter()
    ema = train(denoiser, arguments.iterations)
    minutes = (time.perf_counter() - start) / 60
    denoiser.load_state_dict(ema.shadows[EMA_DECAY])
    denoiser.eval()
    torch.manual_seed(SEED)
    distance, accuracy, speed = score(denoiser)
    to_training, among_training = nearest_neighbours(denoiser)
    ConsistencyModelPipeline(unet=denoiser.network, scheduler=scheduler).save_pretrained(arguments.output)
    result = {
        "fd_digits": round(distance, 4),
        "class_accuracy": round(accuracy, 4),
        "evaluations_per_sample": evaluations(HEUN_STEPS),
        "samples": 1797,
        "nearest_training_image": round(to_training, 2),
        "nearest_among_training_images": round(among_training, 2),
        "iterations": arguments.iterations,
        "batch_size": BATCH,
        "training_minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
    }
    for path in arguments.output.rglob("*.safetensors"):
        path.chmod(0o644)
    (arguments.output / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"{speed:.0f} images/s at {evaluations(HEUN_STEPS)} evaluations")


if __name__ == "__main__":
    main()

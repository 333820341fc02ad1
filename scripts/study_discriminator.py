"""Can a new discriminator tell a student's digits from real ones? How often it is right, by noise level.

    python scripts/study_discriminator.py [STUDENT] [--features down0,down1,mid] [--updates 600] [--images 1797]

STUDENT is a student's folder or a run; without one, the student is what training begins with, the embedded teacher used
once at sigma 2.5. Heads on the teacher's features learn with the optimiser of `configs/digits.yaml`, mostly at little
noise, on three quarters of both sets of images, and are tried on the rest. A half is chance. One minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

import fdistill
from fdistill.base.images import to_unit
from fdistill.data.digits import load_digits
from fdistill.denoiser import Denoiser
from fdistill.discriminator import Discriminator
from fdistill.losses import gan_discriminator_loss

SIGMAS = (0.0, 0.1, 0.3, 1.0, 3.0)
RATE, BATCH = 1e-3, 64


def untrained(teacher: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """What a student of sigma 2.5 draws before it learns."""

    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        x0 = teacher.denoise(2.5 * noise, torch.full((len(noise),), 2.5), labels)
        assert isinstance(x0, Tensor)
        return x0

    return sample


def accuracies(
    teacher: Denoiser, sample: Callable[[Tensor, Tensor], Tensor], features: list[str], updates: int, images: int
) -> list[float]:
    """How often a discriminator is right about images that it did not learn from, between each two of SIGMAS."""
    real, labels = load_digits()
    real, labels = to_unit(real)[:images], labels[:images]
    with torch.no_grad():
        fake = torch.cat(
            [sample(torch.randn_like(x), of) for x, of in zip(real.split(256), labels.split(256), strict=True)]
        )
    train, test = torch.randperm(len(real)).split([3 * len(real) // 4, len(real) - 3 * len(real) // 4])
    heads = Discriminator(teacher, features)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=RATE, betas=(0.0, 0.999), weight_decay=0.0)

    def logits(x0: Tensor, rows: Tensor, sigma: Tensor) -> Tensor:
        x_t = x0[rows] + sigma.view(-1, 1, 1, 1) * torch.randn_like(x0[rows])
        with torch.no_grad():
            _, tapped = teacher.predict(teacher.network_input(x_t, sigma), sigma, labels[rows], features)
        found: Tensor = heads(tapped)
        return found

    def draw(low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(count)

    for _ in range(updates):
        rows = train[torch.randint(len(train), (2, BATCH))]
        sigmas = draw(0.0, 3**0.25, 2 * BATCH).pow(4).clamp(min=1e-3).split(BATCH)  # most of them are low
        loss = gan_discriminator_loss(logits(real, rows[0], sigmas[0]), real=True)
        loss = loss + gan_discriminator_loss(logits(fake, rows[1], sigmas[1]), real=False)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    found = []
    with torch.no_grad():
        for low, high in pairwise(SIGMAS):
            sigma = draw(max(low, 1e-3), high, len(test))
            right = [logits(real, test, sigma).mean(1) > 0, logits(fake, test, sigma).mean(1) < 0]
            found.append(float(torch.cat(right).float().mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?")
    parser.add_argument("--features", default="mid")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--images", type=int, default=1797)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    teacher = fdistill.load_teacher("digits").requires_grad_(False)
    sample = untrained(teacher) if arguments.student is None else fdistill.load_student(arguments.student)
    found = accuracies(teacher, sample, arguments.features.split(","), arguments.updates, arguments.images)
    print("| sigma | " + " | ".join(f"{low:g} to {high:g}" for low, high in pairwise(SIGMAS)) + " |")
    print("|" + "---|" * len(SIGMAS))
    print("| right | " + " | ".join(f"{each:.2f}" for each in found) + " |")


if __name__ == "__main__":
    main()

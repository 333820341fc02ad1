"""Train the digit feature network (fdistill/assets/digits-features): a minute on 2 cores, fixed seed."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from evaluation.extractors.digit_features import DigitFeatures, extract
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.moments import Moments
from fdistill.assets import DIGITS_FEATURES
from fdistill.base.images import to_unit
from fdistill.data.digits import load_digits

SEED, HELD_OUT, EPOCHS, BATCH = 0, 297, 60, 100


def augment(x: torch.Tensor) -> torch.Tensor:
    """Shifts of up to one pixel and a little noise, so that the classes do not hang on single pixels."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    shifted = padded[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
    return shifted + 0.1 * torch.randn_like(shifted) * torch.rand(len(x), 1, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=DIGITS_FEATURES, help="folder of the network's files")
    output = parser.parse_args().output
    torch.manual_seed(SEED)
    images, labels = load_digits()
    order = torch.randperm(len(images))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    network = DigitFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in train[torch.randperm(len(train))].split(BATCH)[: len(train) // BATCH]:
            loss = F.cross_entropy(network(augment(to_unit(images[rows])))[1], labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    features, classes = extract(network, images)
    accuracy = (classes[held_out] == labels[held_out]).double().mean().item()
    halves = torch.randperm(len(images)).chunk(2)
    distance = frechet_distance(*(Moments.of(features[half]) for half in halves))
    card = {
        "architecture": "evaluation.extractors.digit_features.DigitFeatures",
        "held_out_accuracy": round(accuracy, 4),
        "held_out_images": HELD_OUT,
        "frechet_distance_of_random_halves": round(distance, 3),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seed": SEED,
        "script": "scripts/train_digit_features.py",
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()

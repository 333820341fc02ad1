"""Up to which noise level a teacher knows more than the mean of its data, and the cut of levels that follows.

    python scripts/study_levels.py CONFIG [key=value ...] [--images 1797] [--share 0.99]

Prints the teacher's mean squared error of x0 on the config's data, by level, as a share of what the mean of all images
of the same class would have. Above the last level at which it is below --share, the teacher has nothing to teach: that
is `matching_levels.high`. For teachers of classes, or of none; half a minute for the digits on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from fdistill.base.devices import start
from fdistill.base.images import to_unit
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.noise import LEVEL_SAMPLERS, add_noise, noise_to_signal
from fdistill.training.build import build
from fdistill.training.inputs import training_data

FRACTIONS = [step / 20 for step in range(1, 21)]
_AT_ONCE = 256


def class_variance(x0: Tensor, labels: Tensor) -> float:
    """The mean squared error of x0 [B, C, H, W] that the true mean of each class would have; unbiased.

    Raises:
        SystemExit: a class has one image, which says nothing of its variance.
    """
    _, places, counts = labels.unique(return_inverse=True, return_counts=True)
    if int(counts.min()) == 1:
        raise SystemExit(f"{len(x0)} images: a class has one of them alone; expected two or more: set --images higher")
    sums = torch.zeros(len(counts), *x0.shape[1:]).index_add_(0, places, x0)
    means = sums / counts.view(-1, 1, 1, 1)
    squares = (x0 - means[places]).square().mean(dim=(1, 2, 3))
    return float((squares * (counts / (counts - 1))[places]).mean())


@torch.no_grad()
def shares(teacher: Denoiser, x0: Tensor, labels: Tensor, levels: Sequence[Tensor]) -> list[float]:
    """The teacher's mean squared error of x0 at each level, divided by that of the means of classes.

    Args:
        x0: [B, C, H, W] on the CPU.
        labels: [B]; of a teacher without classes all are equal.
        levels: each of shape [].
    """
    blind = class_variance(x0, labels)
    found = []
    for level in levels:
        error = 0.0
        for real, label in zip(x0.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
            t = level.expand(len(real))
            condition = label if teacher.num_classes else None
            guess = teacher.denoise(add_noise(teacher.schedule, real, torch.randn_like(real), t), t, condition)
            assert isinstance(guess, Tensor)
            error += float((guess - real).square().mean(dim=(1, 2, 3)).sum())
        found.append(error / len(x0) / blind)
    return found


def cut(found: Sequence[float], share: float) -> float | None:
    """The largest of FRACTIONS at which the teacher has less than this share of the error of means; None: nowhere."""
    return max((fraction for fraction, each in zip(FRACTIONS, found, strict=True) if each < share), default=None)


def levels_of(config: DistillConfig, teacher: Denoiser) -> list[Tensor]:
    """The levels at FRACTIONS of the grid on which `matching_levels` counts."""
    sampler = config.matching_levels.sampler
    if sampler == "lognormal":
        raise SystemExit("matching_levels.sampler: lognormal has no cuts; expected karras, uniform or shifted")
    options = {"karras": {"rho": config.matching_levels.rho}, "shifted": {"shift": config.matching_levels.shift}}
    u = torch.tensor(FRACTIONS)
    return list(LEVEL_SAMPLERS[sampler](teacher.schedule, u, **options.get(sampler, {})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--share", type=float, default=0.99)
    arguments = parser.parse_args()
    config = load_config(arguments.config, [*arguments.overrides, "device=cpu"])
    run = build(config, start("cpu")[1])
    teacher = run.networks.teacher
    if run.text is not None:
        raise SystemExit(f"{config.teacher}: takes prompts, and hardly two images have the same; expected classes")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    with training_data(run).loader(config, teacher, 0) as loader:
        while sum(len(each) for each in images) < arguments.images:
            batch = next(loader)
            images.append(batch.images if batch.images.is_floating_point() else to_unit(batch.images))
            labels.append(batch.labels if teacher.num_classes else torch.zeros_like(batch.labels))
    x0, of = torch.cat(images)[: arguments.images], torch.cat(labels)[: arguments.images]
    torch.manual_seed(0)
    levels = levels_of(config, teacher)
    found = shares(teacher, x0, of, levels)
    print("| fraction of the levels | noise to signal | share of the error |\n|---|---|---|")
    for fraction, level, each in zip(FRACTIONS, levels, found, strict=True):
        print(f"| {fraction:.2f} | {float(noise_to_signal(teacher.schedule, level)):.4g} | {each:.3f} |")
    high = cut(found, arguments.share)
    print(f"\nmatching_levels.high={high:g}" if high else "\nno cut: the teacher is nowhere better than the mean image")


if __name__ == "__main__":
    main()

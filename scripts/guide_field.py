"""Guide coordinate fields with the embedded digits teacher: SDS, VSD, and VSD weighed by the forward KL divergence.

    python scripts/guide_field.py OUTPUT_DIR [--seeds N] [--iterations N] [--classes 2,4,7] [--methods NAME,...]

A field maps (x, y) to a grey value and is seen as 8x8 images under random shifts and rotations, the way a NeRF is seen
from random cameras. Prints a table of fidelity and diversity; writes fields.json and fields.png.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.extractors.digit_features import DigitFeatures, load_digit_features
from fdistill import Denoiser, DensityRatio, Discriminator, Networks, critic_step, generator_step, load_teacher
from fdistill.base import rng
from fdistill.base.files import atomic_file
from fdistill.base.images import to_unit
from fdistill.data import load_data
from fdistill.losses import score_difference_loss, score_difference_weight
from fdistill.noise import add_noise, karras_levels
from fdistill.sampler import heun_sample
from fdistill.students.lora import lora_copy

SIZE, SHIFT, ANGLE = 8, 1.0, math.radians(10)  # pixels, largest shift in pixels, largest rotation
FREQUENCIES, FREQUENCY_STD, HIDDEN = 32, 0.7, 64
VIEWS, RANK = 16, 8  # views of one field in a batch, rank of the adapters
FIELD_RATE, FAKE_RATE, HEADS_RATE = 4e-3, 3e-3, 1e-3
LEVELS = partial(karras_levels, low=0.02, high=0.65)
CRITIC_LEVELS = partial(karras_levels, low=0.0, high=0.7)
WEIGHTING = "vsd"
REAL, TEACHER = "real digits", "teacher, 35 evaluations"


class Method(NamedTuple):
    """How fields are guided. `together`: the fields of all seeds are one distribution, with one fake score."""

    divergence: str | None  #: None: the fake score is that of a point, as in SDS
    together: bool = False


METHODS = {
    "sds": Method(None),
    "vsd": Method("reverse-kl"),
    "forward-kl": Method("forward-kl"),
    "vsd-together": Method("reverse-kl", together=True),
    "forward-kl-together": Method("forward-kl", together=True),
}


def view_coordinates(noise: Tensor) -> Tensor:
    """Where the pixels of a view lie on the field: standard normal noise [B, 1, 8, 8] -> [B, 64, 2] as (x, y).

    Three of the noise values become a shift in x and in y and an angle, uniform within their bounds.
    """
    shift_x, shift_y, angle = (torch.special.ndtr(noise.flatten(1)[:, :3]) * 2 - 1).unbind(1)
    centres = (torch.arange(SIZE, device=noise.device) * 2 + 1) / SIZE - 1
    y, x = (value.flatten() for value in torch.meshgrid(centres, centres, indexing="ij"))
    cos, sin = torch.cos(angle * ANGLE)[:, None], torch.sin(angle * ANGLE)[:, None]
    pixel = 2 / SIZE * SHIFT
    return torch.stack(
        [cos * x - sin * y + pixel * shift_x[:, None], sin * x + cos * y + pixel * shift_y[:, None]], dim=2
    )


class Fields(nn.Module):
    """`count` coordinate networks as one generator: (noise, condition) -> views, in turn of each field.

    Each is a two-layer MLP over Fourier features of its own, with tanh at the end. Takes the noise of a digits student,
    so it stands where `Networks.generator` is wanted; the condition is for the score networks alone.
    """

    sample_shape = (1, SIZE, SIZE)

    def __init__(self, count: int, generator: torch.Generator):
        super().__init__()
        self.count = count

        def normal(*shape: int) -> Tensor:
            return rng.normal(generator, count, shape)

        self.register_buffer("frequencies", 2 * math.pi * FREQUENCY_STD * normal(2, FREQUENCIES))
        self.weights = nn.ParameterList(
            [normal(a, b) / math.sqrt(a) for a, b in ((2 * FREQUENCIES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1))]
        )
        self.biases = nn.ParameterList([torch.zeros(count, 1, width) for width in (HIDDEN, HIDDEN, 1)])

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """noise [B, 1, 8, 8], B a multiple of `count` -> x0 [B, 1, 8, 8] in [-1, 1]; row i is of field i % count."""
        points = rearrange(view_coordinates(noise), "(b k) p d -> k (b p) d", k=self.count)
        phase = points @ self.get_buffer("frequencies")
        hidden = torch.cat([phase.sin(), phase.cos()], dim=2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, F.silu(hidden) if i else hidden, weight)
        return rearrange(hidden.tanh(), "k (b h w) 1 -> (b k) 1 h w", h=SIZE, w=SIZE)

    @torch.no_grad()
    def upright(self) -> Tensor:
        """[count, 1, 8, 8]: each field without shift and rotation."""
        x0: Tensor = self(torch.zeros(self.count, *self.sample_shape))
        return x0


def sds_loss(networks: Networks, condition: Tensor, generator: torch.Generator) -> Tensor:
    """The update of score distillation: the fake score is that of a point, fake_x0 = x0. Returns per-view losses."""
    schedule = networks.teacher.schedule
    x0 = networks.draw_samples(generator, len(condition), condition, None)
    t = LEVELS(schedule, rng.uniform(generator, len(x0)))
    with torch.no_grad():
        x_t = add_noise(schedule, x0, rng.normal(generator, len(x0), x0.shape[1:]), t)
        teacher_x0, _ = networks.teacher.denoise_with_features(x_t, t, condition, ())
    weight = score_difference_weight(WEIGHTING, schedule.alpha(t), schedule.sigma(t))
    return score_difference_loss(x0, teacher_x0, x0, weight)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Real images [B, 1, 8, 8] under the shifts and rotations of the views (bilinear, black outside)."""
    grid = view_coordinates(rng.normal(generator, len(images), images.shape[1:]))
    return F.grid_sample(images + 1, grid.reshape(-1, SIZE, SIZE, 2), align_corners=False) - 1


def adam(module: nn.Module, rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.99))


def update(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def guide(
    teacher: Denoiser, method: Method, label: int, count: int, seed: int, iterations: int
) -> tuple[Tensor, dict[str, float]]:
    """(upright views [count, 1, 8, 8] of fields guided as one distribution, means of logs over the second half)."""
    generator = torch.Generator().manual_seed(rng.derived_seed(seed, label))
    torch.manual_seed(seed)  # adapters and heads
    fields = Fields(count, generator)
    fake_score = teacher if method.divergence is None else lora_copy(teacher, RANK).train()
    weighed = method.divergence == "forward-kl"
    heads = Discriminator(fake_score, ["mid"]) if weighed else None
    networks = Networks(teacher, fake_score, fields, heads, fake_score if weighed else None)
    data, ratio = load_data("digits"), DensityRatio()
    reals = to_unit(data.images[data.labels == label])
    condition = torch.full((VIEWS * count,), label)
    optimizer = adam(fields, FIELD_RATE)
    critics = [adam(fake_score, FAKE_RATE)] if method.divergence else []
    critics += [adam(heads, HEADS_RATE)] if heads is not None else []
    gan_weight = 1e-2 if weighed else 0.0
    logged: dict[str, list[float]] = {}
    for step in range(iterations):
        progress = step / iterations
        optimizer.param_groups[0]["lr"] = FIELD_RATE * (0.5 + 0.5 * math.cos(math.pi * progress))
        if method.divergence is None:
            update(sds_loss(networks, condition, generator).mean(), optimizer)
            continue
        x0 = moved(reals[torch.randint(len(reals), (len(condition),), generator=generator)], generator)
        critic = critic_step(networks, x0, condition, generator, levels=CRITIC_LEVELS, gan_weight=gan_weight)
        update(critic.loss, *critics)
        result = generator_step(
            networks,
            condition,
            generator,
            batch_size=len(condition),
            divergence=method.divergence,
            ratio=ratio,
            levels=LEVELS,
            weighting=WEIGHTING,
            ratio_ramp=min(1.0, 4 * progress),
            gan_weight=0.0,
        )
        update(result.loss, optimizer)
        if weighed and 2 * step >= iterations:
            logged.setdefault("clamped_ratios", []).append(result.logs["generator/clamped_ratios"].value.mean().item())
            logged.setdefault("weight_std", []).append(result.logs["generator/weight"].value.std().item())
    return fields.upright(), {name: mean(values) for name, values in logged.items()}


def seeds_of(
    teacher: Denoiser, method: Method, label: int, seeds: int, iterations: int
) -> tuple[Tensor, dict[str, float]]:
    """`guide` for [seeds, 1, 8, 8] fields: all as one distribution, or each by itself (logs are then means)."""
    if method.together:
        return guide(teacher, method, label, seeds, 0, iterations)
    images, logs = zip(*(guide(teacher, method, label, 1, seed, iterations) for seed in range(seeds)), strict=True)
    return torch.cat(images), {name: mean(log[name] for log in logs) for name in logs[0]}


@torch.no_grad()
def scores(network: DigitFeatures, images: Tensor, label: int, reals: Tensor) -> dict[str, float]:
    """Fidelity and diversity of images [N, 1, 8, 8], N at least 2, of one class, beside real ones of that class."""
    images = images.clamp(-1, 1)
    features, logits = network(images)
    return {
        "recognised": (logits.argmax(1) == label).double().mean().item(),
        "probability": logits.softmax(1)[:, label].mean().item(),
        "nearest_real": torch.cdist(features, network(reals)[0]).amin(1).mean().item(),
        "feature_diversity": F.pdist(features).mean().item(),
        "pixel_diversity": F.pdist(images.flatten(1)).mean().item() / SIZE,
    }


def save_figure(pictures: dict[str, list[Tensor]], classes: list[int], path: Path) -> None:
    """One panel a class: rows are methods, columns are seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 4.5 * len(classes), 4), layout="constrained")
    for k, axes in enumerate(figure.subplots(1, len(classes), squeeze=False)[0]):
        cells = np.stack([images[k].clamp(-1, 1).numpy() for images in pictures.values()])
        cells = np.pad(cells, ((0, 0), (0, 0), (0, 0), (1, 0), (1, 0)))
        axes.imshow(rearrange(cells, "m n 1 h w -> (m h) (n w)"), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"class {classes[k]}")
        axes.set_xticks([])
        axes.set_yticks([9 * row + 4.5 for row in range(len(pictures))], list(pictures))
        axes.tick_params(left=False, labelleft=k == 0)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def cell(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" +- {stdev(values):.2f}" if len(values) > 1 else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=8, help="fields of each class and method, at least 2")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--classes", default="2,4,7")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"some of {', '.join(METHODS)}")
    options = parser.parse_args(arguments)
    names, classes = options.methods.split(","), [int(label) for label in options.classes.split(",")]
    if options.seeds < 2 or not set(names) <= METHODS.keys():
        parser.error(f"expected at least 2 seeds, and methods out of {', '.join(METHODS)}")

    torch.set_num_threads(1)
    teacher, network, data = load_teacher("digits"), load_digit_features(), load_data("digits")
    rows = [REAL, TEACHER, *names]
    pictures: dict[str, list[Tensor]] = {row: [] for row in rows}
    scored: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    logs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for label in classes:
        generator = torch.Generator().manual_seed(label)
        reals = to_unit(data.images[data.labels == label])
        reals = reals[torch.randperm(len(reals), generator=generator)]
        noise = rng.normal(generator, options.seeds, teacher.sample_shape)
        pictures[REAL].append(reals[: options.seeds])
        pictures[TEACHER].append(heun_sample(teacher, noise, torch.full((options.seeds,), label)))
        for name in tqdm(names, desc=f"class {label}", unit="method"):
            start = time.perf_counter()
            images, log = seeds_of(teacher, METHODS[name], label, options.seeds, options.iterations)
            seconds[name] += time.perf_counter() - start
            pictures[name].append(images)
            logs[name].append(log)
        for row in rows:
            scored[row].append(scores(network, pictures[row][-1], label, reals[options.seeds :]))

    options.output.mkdir(parents=True, exist_ok=True)
    save_figure(pictures, classes, options.output / "fields.png")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result = {"settings": settings, "torch": torch.__version__, "seconds": seconds, "scores": scored, "logs": logs}
    with atomic_file(options.output / "fields.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print("| | " + " | ".join(scored[REAL][0]) + " |\n" + "|---" * (len(scored[REAL][0]) + 1) + "|")
    for row, values in scored.items():
        print(f"| {row} | " + " | ".join(cell([value[key] for value in values]) for key in values[0]) + " |")


if __name__ == "__main__":
    main()

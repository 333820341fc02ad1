"""Which modes of a 2-D mixture a one-step student finds, divergence by divergence, from a teacher that is exact.

    python scripts/study_modes.py OUTPUT_DIR [--divergences rkl,sf,sh,js,kl,jf,neyman,pearson] [--seeds 0,1,2,3,4]

Teacher: the closed-form posterior mean of the mixture at every noise level. Student, fake score and discriminator:
small MLPs, all new. Nothing but the divergence differs between runs of one seed. Writes modes.json and modes.png, and
prints the table.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from fdistill import get_divergence
from fdistill.base import rng
from fdistill.denoiser import Denoiser, Features
from fdistill.noise import EDMSchedule
from fdistill.ratio import DensityRatio
from fdistill.step import Networks, critic_step, generator_step

SHAPE = (2, 1, 1)
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA, MODE_STD = 0.02, 1.0, 0.7, 0.05
WIDTH, FREQUENCIES, NOISE_FREQUENCIES = 128, (1.0, 2.0, 4.0), (1.0, 2.0, 4.0, 8.0)
BATCH, CRITIC_ONLY, STUDENT_RATE, CRITIC_RATE, BETAS = 512, 100, 2e-3, 2e-3, (0.5, 0.99)
SAMPLES, RADIUS, FOUND_SHARE = 20_000, 3.0, 0.2
SCORES = ("modes_found", "weight_error", "precision")


class MixtureDenoiser(Denoiser):
    """The exact x0-prediction of data sum_k weights[k] N(means[k], std^2 I), under EDM's schedule.

    Its one feature, "point", is (x_t, sigma) embedded for an MLP: a discriminator that reads it shares no parameter
    with any other network.

    Args:
        means: [K, 2].
        weights: [K], summing to 1.
    """

    means: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, weights: Tensor, std: float = MODE_STD):
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("weights", weights)
        self.std = std
        self.schedule = EDMSchedule(SIGMA_MIN, SIGMA_MAX)
        self.sample_shape, self.num_classes, self.sigma_data = SHAPE, None, SIGMA_DATA
        self.feature_shapes = {"point": (embed(torch.zeros(1, 2), torch.ones(1)).shape[1], 1, 1)}

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Tensor | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        x, sigma = network_input.flatten(1), self.schedule.sigma(t)
        tapped = {name: embed(x, sigma)[..., None, None] for name in features}
        if not output:
            return None, tapped
        with torch.set_grad_enabled(output_grad and torch.is_grad_enabled()):
            variance = (self.std**2 + sigma.square())[:, None]
            distance = (x[:, None] - self.means).square().sum(2)
            posterior = torch.softmax(self.weights.log() - distance / (2 * variance), dim=1)
            prediction = x + sigma.square()[:, None] / variance * (posterior @ self.means - x)
        return prediction.reshape(network_input.shape), tapped

    def sample(self, generator: torch.Generator, count: int) -> Tensor:
        """[count, 2, 1, 1] exact samples of the data."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return (self.means[mode] + self.std * rng.normal(generator, count, (2,))).reshape(count, *SHAPE)


class MLPDenoiser(Denoiser):
    """A trained x0-prediction: an MLP in EDM's preconditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = EDMSchedule(SIGMA_MIN, SIGMA_MAX)
        self.sample_shape, self.num_classes, self.sigma_data = SHAPE, None, SIGMA_DATA
        self.feature_shapes = {}
        self.mlp = mlp(embed(torch.zeros(1, 2), torch.ones(1)).shape[1], 2)

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Tensor | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        with torch.set_grad_enabled(output_grad and torch.is_grad_enabled()):
            x, sigma = network_input.flatten(1), self.schedule.sigma(t)
            total = (sigma.square() + SIGMA_DATA**2)[:, None]
            out = self.mlp(embed(x, sigma)) * sigma[:, None] * SIGMA_DATA / total.sqrt()
            return (x * SIGMA_DATA**2 / total + out).reshape(network_input.shape), {}


class Student(nn.Module):
    """One step: noise [B, 2, 1, 1] -> x0 of the same shape."""

    sample_shape = SHAPE

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(2 + 4 * len(NOISE_FREQUENCIES), 2)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        x0: Tensor = self.mlp(waves(noise.flatten(1), NOISE_FREQUENCIES)).reshape(noise.shape)
        return x0


class PointDiscriminator(nn.Module):
    """log(p_teacher / p_student) at (x_t, sigma), as an MLP on the teacher's feature "point"."""

    features = ("point",)

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        self.mlp = mlp(teacher.feature_shapes["point"][0], 1)

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.mlp(features["point"].flatten(1))
        return logits


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, WIDTH, WIDTH):
        layers += [nn.Linear(width, WIDTH), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def embed(x: Tensor, sigma: Tensor) -> Tensor:
    """Points [B, 2] at levels [B] -> [B, C]: scaled to unit variance, some waves of them, and log sigma."""
    scaled = x / (sigma.square() + SIGMA_DATA**2).sqrt()[:, None]
    return torch.cat([waves(scaled, FREQUENCIES), sigma.log()[:, None] / 2], dim=1)


def waves(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """[B, 2] and its sines and cosines: without them an MLP this small has no edges sharp enough for separate modes."""
    return torch.cat([x, *(wave(frequency * x) for frequency in frequencies for wave in (torch.sin, torch.cos))], dim=1)


def mixtures() -> dict[str, MixtureDenoiser]:
    """25 equal Gaussians on a grid, and 8 on a ring whose weights fall geometrically to 1/30."""
    axis = torch.linspace(-1, 1, 5)
    angle = torch.arange(8) * math.tau / 8
    weights = 30.0 ** (-torch.arange(8) / 7)
    return {
        "grid": MixtureDenoiser(torch.cartesian_prod(axis, axis), torch.full((25,), 1 / 25)),
        "ring": MixtureDenoiser(torch.stack([angle.cos(), angle.sin()], dim=1), weights / weights.sum()),
    }


def train(teacher: MixtureDenoiser, divergence: str, seed: int, iterations: int) -> tuple[Student, dict[str, float]]:
    """A student, and how long it took and how many of its last ratios were clamped."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(rng.derived_seed(seed, 0))
    networks = Networks(teacher, MLPDenoiser(), Student(), PointDiscriminator(teacher), teacher)  # type: ignore[arg-type]
    assert networks.discriminator is not None
    parameters = [*networks.fake_score.parameters(), *networks.discriminator.parameters()]
    critic = torch.optim.Adam(parameters, CRITIC_RATE, BETAS, fused=True)
    student = torch.optim.Adam(networks.generator.parameters(), STUDENT_RATE, BETAS, fused=True)
    falling = torch.optim.lr_scheduler.LinearLR(student, 1.0, 0.0, iterations)
    ratio = DensityRatio(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    clamped, start = [], time.perf_counter()

    def update_critic() -> None:
        critic.zero_grad()
        critic_step(networks, teacher.sample(generator, BATCH), None, generator, gan_weight=1.0).loss.backward()
        critic.step()

    for _ in range(min(CRITIC_ONLY, iterations)):
        update_critic()
    for iteration in range(iterations):
        update_critic()
        result = generator_step(
            networks, None, generator, batch_size=BATCH, divergence=divergence, ratio=ratio, gan_weight=0.0
        )
        student.zero_grad()
        result.loss.backward()
        student.step()
        falling.step()
        if "generator/clamped_ratios" in result.logs and iteration >= 0.8 * iterations:
            clamped.append(result.logs["generator/clamped_ratios"].value.mean().item())
    log = {"seconds": round(time.perf_counter() - start, 1)}
    if clamped:
        log["clamped_ratios"] = round(mean(clamped), 4)
    assert isinstance(networks.generator, Student)
    return networks.generator, log


def score(x0: Tensor, teacher: MixtureDenoiser) -> dict[str, Any]:
    """Modes found, total variation between the frequencies of nearest modes and the weights, share near a mode."""
    distance, nearest = torch.cdist(x0.flatten(1), teacher.means).min(1)
    near = distance < RADIUS * teacher.std
    modes = len(teacher.means)
    frequencies = torch.bincount(nearest, minlength=modes) / len(x0)
    hits = torch.bincount(nearest[near], minlength=modes) / len(x0)
    return {
        "modes_found": int((hits >= FOUND_SHARE * teacher.weights).sum()),
        "weight_error": round((frequencies - teacher.weights).abs().sum().item() / 2, 4),
        "precision": round(near.float().mean().item(), 4),
        "frequencies": [round(frequency, 5) for frequency in frequencies.tolist()],
    }


def table(runs: list[dict[str, Any]]) -> str:
    def cell(values: list[float], digits: int) -> str:
        spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    rows = ["| mixture | divergence | modes found | weight error | precision |", "|---|---|---|---|---|"]
    for mixture, name in sorted(dict.fromkeys((run["mixture"], run["divergence"]) for run in runs), key=lambda k: k[0]):
        mine = [run for run in runs if (run["mixture"], run["divergence"]) == (mixture, name)]
        cells = [cell([run[key] for run in mine], 1 if key == "modes_found" else 3) for key in SCORES]
        rows.append(f"| {mixture} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(panels: dict[tuple[str, str], tuple[Tensor, int]], teachers: dict[str, MixtureDenoiser], path: Path) -> None:
    """Samples of one seed, a block of rows for each mixture; panels maps (mixture, name) to (x0, modes found)."""
    names = list(dict.fromkeys(name for _, name in panels))
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows * len(teachers)), layout="constrained")
    axes = figure.subplots(rows * len(teachers), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for (mixture, name), (x0, found) in panels.items():
        means = teachers[mixture].means
        ax = axes.flat[list(teachers).index(mixture) * rows * columns + names.index(name)]
        ax.set_axis_on()
        ax.scatter(*means.T, s=60, facecolors="none", edgecolors="0.6", linewidths=0.6)
        ax.scatter(*x0.flatten(1)[:3000].T, s=1, linewidths=0, color="black" if name == "exact" else "tab:blue")
        ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])
        ax.set_title(f"{mixture}, {name}\n{found} of {len(means)} modes", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--divergences", default="rkl,sf,sh,js,kl,jf,neyman,pearson")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--iterations", type=int, default=1500)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    names = [get_divergence(name).name for name in arguments.divergences.split(",")]
    torch.set_num_threads(1)  # networks this small gain nothing from a second core
    arguments.output.mkdir(parents=True, exist_ok=True)

    teachers = mixtures()
    runs: list[dict[str, Any]] = []
    panels: dict[tuple[str, str], tuple[Tensor, int]] = {}
    settings = {key: value for key, value in globals().items() if key.isupper()} | {"iterations": arguments.iterations}
    result = {
        "settings": settings,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "runs": runs,
    }
    jobs = [(mixture, name, seed) for name in ("exact", *names) for mixture in teachers for seed in seeds]
    for mixture, name, seed in tqdm(jobs, unit="run"):
        teacher, draws = teachers[mixture], torch.Generator().manual_seed(rng.derived_seed(seed, 1))
        log: dict[str, float] = {}
        if name == "exact":
            x0 = teacher.sample(draws, SAMPLES)
        else:
            student, log = train(teacher, name, seed, arguments.iterations)
            with torch.no_grad():
                x0 = student(rng.normal(draws, SAMPLES, SHAPE))
        runs.append({"mixture": mixture, "divergence": name, "seed": seed, **score(x0, teacher), **log})
        panels.setdefault((mixture, name), (x0, runs[-1]["modes_found"]))
        (arguments.output / "modes.json").write_text(json.dumps(result, indent=1) + "\n")
        if seed == seeds[-1]:
            draw(panels, teachers, arguments.output / "modes.png")
    print(table(runs))


if __name__ == "__main__":
    main()

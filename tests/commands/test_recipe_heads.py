"""The comment at the top of a recipe: each setting is published or explained, and the arithmetic is right."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.methods import METHODS
from support.extras import recipes
from support.published import published_network
from support.recipe_heads import CONFIGS, WarmUp, hours, paragraphs, problems, table_rows

RECIPES = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "\nsmoke:" in path.read_text()]
PAGE = (Path(__file__).parent.parent.parent / "docs" / "recipes.md").read_text()


def head(name: str) -> str:
    return (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_is_published_somewhere_or_ours_for_a_reason(name: str) -> None:
    assert problems(head(name)) == []


GOOD = """# A recipe.
# As published (its paper, CIFAR-10): method, generator.lr and
#   *.beta1. Its rate is that of the paper.
# Ours: batch_size and log (what fits; no more, no less. Not measured); ema.decays (short). The rest is not said.
# Failures: none.
method: f-distill
generator: {lr: 1e-4, beta1: 0.9}
fake_score: {beta1: 0.9}
batch_size: 8
log: {every: 1, samples_every: 5}
ema: {decays: [0.9]}
smoke: {images: 3}
"""


def test_the_lists_are_read_as_they_are_meant() -> None:
    assert problems(GOOD) == []
    assert [(p.heading, p.source) for p in paragraphs(GOOD)] == [
        ("As published", "its paper, CIFAR-10"),
        ("Ours", None),
        ("Failures", None),
    ]


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("batch_size: 8\n", "batch_size: 8\niterations: 5\n", "iterations: in neither list"),
        ("{beta1: 0.9}", "{beta1: 0.9, lr: 1.0}", "fake_score.lr: in neither list"),
        ("method, generator.lr", "method, seed, generator.lr", "seed: not in the config"),
        ("generator.lr and", "generator.lr, generator.beta1 and", "generator.beta1: named twice"),
        ("method, ", "method, log.every, ", "log.every: named twice"),
        ("ema.decays (short)", "ema.decays", "no reason: ema.decays"),
        (" (its paper, CIFAR-10)", "", "as published where? method, generator.lr"),
    ],
)
def test_a_setting_without_a_source_or_a_reason_is_found(before: str, after: str, problem: str) -> None:
    assert before in GOOD
    assert any(found.startswith(problem) for found in problems(GOOD.replace(before, after)))


class Cost(NamedTuple):
    """TFLOP of a forward pass of the published network, and the share of it that the discriminator's features take."""

    forward: float
    share: float


@functools.cache
def counted(name: str) -> Cost:
    denoiser, config = published_network(name), load_config(name)
    features = config.discriminator.features if config.discriminator.gan_weight else []
    x, t = (torch.empty(1, *shape, device="meta") for shape in (denoiser.sample_shape, ()))
    condition = denoiser.example_condition(1, "meta")
    spent = []
    for tapped, output in (((), True), (features, False)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if tapped or output:
                denoiser.run(x, t, condition, tapped, output=output, output_grad=False)
        spent.append(counter.get_total_flops())
    return Cost(spent[0] / 1e12, spent[1] / spent[0])


def passes(config: DistillConfig, share: float) -> float:
    """Forward passes that one image of an iteration costs.

    A backward pass is two forward ones, or one where the weights of a network are frozen, as those below adapters are;
    with checkpointing, each differentiated pass runs once more. A student of K steps takes (K - 1) / 2 of them
    beforehand, on average. The discriminator reads its features once from the student's image and once from a real one;
    in the student's update they are differentiated with respect to the image.
    """
    again = float(config.gradient_checkpointing)
    steps = len(config.student_levels or (0.0,))
    simulated, fake = (steps - 1) / 2, 2 + again + (not config.fake_score.lora_rank)
    critic = 1 + simulated + fake * (1 + (config.fake_score.training_guidance_scale != 1)) + 2 * share
    compared: float = guided(config) + 1 + (config.fake_score.guidance_scale != 1)
    compared *= 2 + again if "implicit" in METHODS[config.method].student else 1  # the gradient passes through both
    beyond = bool(config.augmentation.weight)  # guidance at a level of its own
    return config.critic_steps * critic + simulated + students_update(config) + compared + beyond + share * (1 + again)


def students_update(config: DistillConfig) -> int:
    return 2 + config.gradient_checkpointing + (not config.student.lora_rank)


def guided(config: DistillConfig) -> int:
    return 1 + (config.guidance_scale != 1 and "FLUX.1" not in config.teacher)  # FLUX.1-dev takes its scale as input


def warm_up(config: DistillConfig) -> WarmUp | None:
    """The stage of regression; operations in forward passes. Heun's method has two evaluations a step, the last one."""
    stages = [stage for stage in config.stage_configs() if stage.method == "regression" and config.stages]
    if not stages:
        return None
    (stage,) = stages
    pairs = stage.regression.pairs * (2 * stage.teacher_samples.num_steps - 1) * guided(stage)
    updates = stage.iterations * stage.batch_size * students_update(stage)
    return WarmUp(stage.regression.pairs, stage.iterations, pairs + updates)


@pytest.mark.thorough  # it counts each published network
@pytest.mark.parametrize("name", recipes(RECIPES))
def test_the_hours_are_what_their_numbers_make(name: str) -> None:
    said, config, cost = hours(head(name)), load_config(name), counted(name)
    before = warm_up(config)
    assert (said.iterations, said.batch) == (
        config.iterations - (before.iterations if before else 0),
        config.batch_size,
    )
    assert said.forward == pytest.approx(cost.forward, rel=0.01)
    found = passes(config, cost.share)
    assert abs(said.passes - found) <= 0.6, found
    assert said.total == pytest.approx(found * cost.forward * said.iterations * said.batch, rel=0.03)
    total = said.total
    assert (before is None) == (said.warm_up is None)
    if before and said.warm_up:
        assert said.warm_up[:2] == before[:2]
        assert said.warm_up.total == pytest.approx(before.total * cost.forward, rel=0.03)
        total += said.warm_up.total
    for told, rate in ((said.assumed, said.assumed_rate), (said.implied, said.implied_rate)):
        exact = total / rate / said.gpus / 3600
        assert told == pytest.approx(exact, rel=0.03, abs=0.6), exact


@pytest.mark.thorough  # it counts three large networks
def test_the_rates_are_assumed_or_implied_by_published_runs() -> None:
    """A run: network, images in a batch, counted updates, GPUs and hours, as DMD2's pages have them."""
    rates = {}
    for run, network, *numbers in table_rows(
        PAGE, ["run of DMD2", "network", "passes", "images", "updates", "GPUs", "hours", "TFLOP/s per GPU"]
    ):
        each, images, updates, gpus, time, rate = (float(number.replace(",", "")) for number in numbers)
        exact = each * counted(network).forward * images * updates / (gpus * time * 3600)
        assert rate == pytest.approx(exact, rel=0.05), run
        rates[network] = rate
    assert rates.keys() == {"imagenet64", "sd15", "sdxl"}
    for name in RECIPES:
        said, card = hours(head(name)), "RTX 4090" in head(name)
        assert said.assumed_rate == (60 if card else 150 if load_config(name).precision == "bf16" else 75), name
        large = any(large in name for large in ("sdxl", "sd35", "flux", "pixart", "z-image", "qwen", "sana"))
        implied = rates["sdxl"] if large else min(rates["imagenet64"], rates["sd15"])
        assert said.implied_rate == pytest.approx(implied * said.assumed_rate / 150, rel=0.05), name


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_has_the_hours_of_the_head(name: str) -> None:
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| [{name}](presets.md#{name})"))
    said = hours(head(name))
    machine = "8 H100" if said.gpus == 8 else "one RTX 4090" if "24gb" in name else "one H100"
    assert row.split("|")[-2].strip() == f"{said.assumed:.0f} to {said.implied:.0f} on {machine}"


@pytest.mark.parametrize(("name", "papers"), [("cifar10-cond", 60_000), ("imagenet64", 380_000), ("sd15", 60_000)])
def test_what_is_unproven_of_the_iterations_is_said(name: str, papers: int) -> None:
    (unproven,) = (p.text for p in paragraphs(head(name)) if p.heading == "Unproven")
    assert f"{papers:,} iterations" in unproven
    assert re.search(r"five times as many, [\d,]+", unproven)
    assert "eval.every" in unproven
    said = hours(head(name))
    longer = re.findall(r"five times as many, ([\d,]+)[^.]*? takes? (\d+) hours", unproven)
    assert longer
    for many, time in longer:
        exact = said.assumed * int(many.replace(",", "")) / said.iterations
        assert math.isclose(float(time), exact, rel_tol=0.03), exact

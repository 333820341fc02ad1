"""The settings that recipes call published, against the published numbers in the publishers' own terms."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from support.recipe_heads import CONFIGS, paragraphs, table_rows

PAGE = (CONFIGS.parent / "docs" / "memory.md").read_text()
RECIPES = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "\nsmoke:" in path.read_text()]


class Published(NamedTuple):
    """f-distill's table of hyper-parameters (arXiv 2502.15681) and FastGen's configs; every update counts."""

    updates: int
    of_which_one_is_the_students: int
    batch: int | None
    lr: float
    gan_weight: float
    guidance: float
    start: float
    features: int
    divergence: str
    ratio_momentum: float | None


PUBLISHED = {
    "cifar10-cond": Published(100_000, 5, 2048, 1e-4, 1e-3, 1, 80, 3, "forward-kl", 0),
    "imagenet64": Published(600_000, 5, 512, 2e-6, 3e-3, 1, 80, 1, "jensen-shannon", 0.5),
    "sd15": Published(60_000, 10, 1024, 1e-5, 1e-3, 1.75, 999, 1, "jensen-shannon", 0),
    "sdxl": Published(25_000, 5, None, 5e-7, 5e-3, 8, 399, 1, "jensen-shannon", None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_f_distills_own_runs(name: str) -> None:
    config, published = load_config(name), PUBLISHED[name]
    last = config.stage_configs()[-1]
    assert (config.method, config.divergence) == ("f-distill", published.divergence)
    assert last.critic_steps + 1 == published.of_which_one_is_the_students
    assert last.iterations * (last.critic_steps + 1) == published.updates
    assert published.batch in (None, config.batch_size)
    assert published.ratio_momentum in (None, config.ratio.momentum)
    assert (config.guidance_scale, config.student_level) == (published.guidance, published.start)
    for role, section in last.roles.items():
        if not (role == "fake_score" and config.fake_score.lora_rank):
            assert section.lr == published.lr, role
        assert (section.beta1, section.beta2, section.weight_decay) == (0.9, 0.999, 0.01), role
    assert (config.generator.grad_clip, config.generator.gan_weight) == (10, published.gan_weight)
    discriminator = config.discriminator
    assert (discriminator.source, len(discriminator.features)) == ("teacher", published.features)
    assert (discriminator.gan_weight, discriminator.r1_weight) == (1, 0)
    assert (config.ratio.lower, config.ratio.upper, config.ratio.num_bins) == (0.1, 20, 10)


@pytest.mark.parametrize("name", ["cifar10-cond", "imagenet64"])
def test_edms_levels_and_averages(name: str) -> None:
    """Karras indices 2 to 998 of 1000; averages of 0.9996, 0.9999 and 0.99995 at every counted update."""
    config = load_config(name)
    for levels in (config.matching_levels, config.critic_levels):
        assert (levels.sampler, levels.rho, levels.low, levels.high) == ("karras", 7, 0.002, 0.998)
    assert config.ema.decays == pytest.approx([decay**5 for decay in (0.9996, 0.9999, 0.99995)], abs=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_stable_diffusions_levels(name: str) -> None:
    """DMD2 matches at timesteps 20 to 980; FastGen's critic has t uniform in [0.001, 0.999]."""
    config = load_config(name)
    found = [(levels.sampler, levels.low, levels.high) for levels in (config.matching_levels, config.critic_levels)]
    assert found == [("uniform", 0.02, 0.98), ("uniform", 0.001, 0.999)]


def test_sdxls_warm_up_is_dmd2s() -> None:
    first = load_config("sdxl").stage_configs()[0]
    assert (first.method, first.iterations, first.regression.pairs) == ("regression", 2000, 10_000)
    assert (first.generator.lr, first.generator.lr_warmup) == (1e-5, 500)


def test_flux_follows_fastgens_config() -> None:
    config = load_config("flux-dev")
    assert {section.lr for name, section in config.roles.items() if name == "discriminator"} == {1e-5}
    assert (config.generator.gan_weight, config.discriminator.head) == (0.03, "pooled")
    assert config.discriminator.shared_noise
    assert (config.critic_levels.sampler, len(config.student_levels or ())) == ("uniform", 4)


def gpus(config: DistillConfig, head: str) -> tuple[int, float]:
    """Samples per GPU and the peak in GB, as the head says them."""
    (text,) = (paragraph.text for paragraph in paragraphs(head) if paragraph.heading == "Hardware")
    each: Any = re.search(r"a batch of (\d+) (?:images|latents)", text)
    peak: Any = re.search(r"needs ([\d.]+) GB at its peak", text)
    count = 8 if text.startswith("8 GPUs") else 1
    assert int(each[1]) * count == config.batch_size
    return int(each[1]), float(peak[1])


@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_is_that_of_the_counted_table(name: str) -> None:
    header = ["recipe", "samples per GPU", "weights, AdamW, EMA", "critic's update", "student's update", "peak, GB"]
    (row,) = (cells for cells in table_rows(PAGE, header) if cells[0] == name)
    assert gpus(load_config(name), (CONFIGS / f"{name}.yaml").read_text()) == (int(row[1]), float(row[-1]))

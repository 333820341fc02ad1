"""A run against the same iterations written out: which update comes when, with which samples, seeds and conditions, and
what is clipped, averaged and recorded. Equal to the last bit: the same operations run in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from fdistill import distill
from fdistill.base import rng
from fdistill.base.rng import Stream
from fdistill.config.reading import load_config
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.step import StepResult, critic_step, generator_step
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints
from fdistill.training.inputs import training_data
from fdistill.training.journal import read_records
from fdistill.training.updates import level_draw
from support.denoisers import tiny_unet

NONE = 10
SETTINGS: dict[str, Any] = {
    "null_class": NONE,
    "guidance_scale": 1.5,
    "student_level": [2.5, 0.5],
    "condition_dropout": 0.4,
    "batch_size": 8,
    "iterations": 5,
    "critic_steps": 2,
    "seed": 3,
    "ratio.warmup": 3,
    "ratio.momentum": 0.5,
    "discriminator.gan_weight": 0.5,
    "generator.gan_weight": 0.2,
    "generator.lr_warmup": 0,
    "fake_score.lr_warmup": 0,
    "ema.decays": [0.5, 0.8],
    "ema.export": 0.8,
    "log.every": 2,
    "log.samples_every": 0,
    "log.checkpoint_every": 0,
    "log.tracker": "none",
}
#: lr, beta1, beta2, eps, weight_decay, grad_clip: below the gradients' norms, so that all are clipped.
OPTIMIZERS = {
    "generator": (1e-3, 0.3, 0.99, 1e-7, 0.02, 0.01),
    "fake_score": (2e-3, 0.1, 0.98, 1e-6, 0.03, 0.3),
    "discriminator": (4e-3, 0.2, 0.97, 1e-5, 0.04, 0.02),
}
NAMES = ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_clip")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    ConsistencyModelPipeline(tiny_unet(num_class_embeds=NONE + 1), scheduler).save_pretrained(folder)
    return folder


def means(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of everything that was logged under a name."""
    names = {name for step in steps for name in step}
    return {name: torch.cat([step[name].reshape(-1) for step in steps if name in step]).mean().item() for name in names}


def test_a_run_is_its_iterations_written_out(teacher: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {
        f"{role}.{name}": value
        for role, values in OPTIMIZERS.items()
        for name, value in zip(NAMES, values, strict=True)
    }
    settings["teacher"] = str(teacher)
    student = distill("digits", output=tmp_path / "run", **settings)

    device, config = torch.device("cpu"), load_config("digits", settings)
    made = build(config, device)
    networks, ratio = made.networks, DensityRatio(momentum=0.5, sigma_min=0.002, sigma_max=80.0)
    modules: dict[str, Any] = {role: getattr(networks, role) for role in OPTIMIZERS}
    optimizers = {
        role: torch.optim.AdamW(modules[role].parameters(), lr, (b1, b2), eps, weight_decay, fused=True)
        for role, (lr, b1, b2, eps, weight_decay, _) in OPTIMIZERS.items()
    }
    averages = {decay: {k: v.clone() for k, v in made.student.state_dict().items()} for decay in (0.5, 0.8)}
    steps: list[dict[str, Tensor]] = []

    def update(result: StepResult, *roles: str) -> None:
        result.loss.backward()
        logged = {name: value.value for name, value in result.logs.items()}
        for role in roles:
            parameters, clip = list(modules[role].parameters()), OPTIMIZERS[role][-1]
            logged[f"{role}/grad_norm"] = nn.utils.clip_grad_norm_(parameters, clip)
            assert logged[f"{role}/grad_norm"] > clip
            optimizers[role].step()
            optimizers[role].zero_grad()
        steps.append(logged)

    def seed(stream: Stream, *numbers: int) -> int:
        return rng.derived_seed(3, stream, *numbers)

    random, dropped = torch.Generator(), 0
    matching, critic = level_draw(config.matching_levels), level_draw(config.critic_levels)
    with training_data(made).loader(config, networks.teacher, 0) as loader:
        for iteration in range(5):
            random.manual_seed(seed(Stream.STEP, iteration))
            torch.manual_seed(seed(Stream.DROPOUT, iteration, 0))
            for k in range(2):
                batch = next(loader)
                labels = batch.labels
                none = (
                    torch.rand(8, generator=torch.Generator().manual_seed(seed(Stream.NO_CONDITION, iteration, k)))
                    < 0.4
                )
                dropped += int(none.sum())
                result = critic_step(
                    networks,
                    batch.images.float() / 127.5 - 1,
                    labels,
                    random,
                    levels=critic,
                    gan_weight=0.5,
                    critic_condition=torch.where(none, NONE, labels),
                    rollout=Rollout((2.5, 0.5)[: 1 + seed(Stream.STUDENT_STEP, iteration, k) % 2]),
                )
                update(result, "fake_score", "discriminator")
            result = generator_step(
                networks,
                labels,
                random,
                batch_size=8,
                divergence="jensen-shannon",
                ratio=ratio,
                ratio_ramp=min(1.0, iteration / 3),
                levels=matching,
                gan_weight=0.2,
                rollout=Rollout((2.5, 0.5)[: 1 + seed(Stream.STUDENT_STEP, iteration, 2) % 2]),
            )
            update(result, "generator")
            for decay, average in averages.items():
                for name, value in made.student.state_dict().items():
                    average[name] = decay * average[name] + (1 - decay) * value
    assert 0 < dropped < 80

    state = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.safetensors")
    for role, module in modules.items():
        for name, value in module.state_dict().items():
            assert torch.equal(state[f"{role}.{name}"], value), f"{role}.{name}"
    assert torch.equal(state["ratio.bins"], ratio.bins)
    exported = load_file(student / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in averages[0.8].items():
        torch.testing.assert_close(state[f"ema.0.8.{name}"], value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(state[f"ema.0.5.{name}"], averages[0.5][name], rtol=1e-6, atol=1e-7)
        assert torch.equal(state[f"ema.0.8.{name}"], exported[name.removeprefix("denoiser.network.")])

    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [2, 4, 5]
    for record, part in zip(records, (steps[:6], steps[6:12], steps[12:]), strict=True):
        for name, value in means(part).items():
            assert record[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        for name in ("generator/h", "generator/weight"):
            values = torch.cat([step[name] for step in part if name in step])
            assert (record[f"{name}_min"], record[f"{name}_max"]) == (values.min().item(), values.max().item())

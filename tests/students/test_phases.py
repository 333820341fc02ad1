"""Experts by noise interval: which takes which step, what their phases compare, and whole runs of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdistill import distill, generate, load_student
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError
from fdistill.commands.side_by_side import Wish, draw, open_pair
from fdistill.config.reading import load_config
from fdistill.data.sample_loader import FixedSamples
from fdistill.divergence import get_divergence
from fdistill.formats.lora_file import read_lora
from fdistill.generation.generate import open_maker
from fdistill.generation.sampling import Sampling
from fdistill.generator import FewStepGenerator, Student
from fdistill.noise import EDMSchedule, FlowSchedule, NoiseSchedule, noise_to_signal, vp_schedule_from_config
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.step import Networks
from fdistill.students.export import export_student
from fdistill.students.phases import PhasedGenerator, Phases
from fdistill.training.batches import Batches
from fdistill.training.build import build
from fdistill.training.inputs import TrainingData
from fdistill.training.updates import critic_update, student_update
from support.denoisers import GaussianDenoiser
from support.testbed import F64, TEACHER_1D

DDPM = vp_schedule_from_config({"_class_name": "DDPMScheduler"})
LEVELS = (1.0, 0.75, 0.5, 0.25)


def expert(mean: float) -> GaussianDenoiser:
    """A network that knows that all images are `mean`."""
    return GaussianDenoiser(mean, 0.0, FlowSchedule())


def test_levels_are_divided_evenly() -> None:
    assert Phases.equal(LEVELS, 2) == Phases(LEVELS, (0, 2))
    assert Phases.equal(LEVELS, 3).counts() == (1, 1, 2)
    phases = Phases.equal(LEVELS, 2)
    assert (phases.until(0), phases.until(1)) == (LEVELS[:2], LEVELS)
    assert (phases.end(0), phases.end(1)) == (0.5, 0.0)
    assert Phases.from_settings(json.loads(json.dumps(phases.settings()))) == phases
    with pytest.raises(ArgumentError, match="expected rising indices of 4 levels from 0"):
        Phases(LEVELS, (0, 4))


def test_each_expert_takes_the_steps_of_its_interval() -> None:
    """Experts that know images of 1, 2 and 3: the x0 of every step says which of them took it."""
    phases = Phases.equal((0.9, 0.8, 0.6, 0.5, 0.3, 0.2), 3)
    student = PhasedGenerator(expert(3.0), phases, [expert(1.0), expert(2.0)])
    assert [student.denoiser_at(level).mean for level in phases.levels] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert student.first_trained == 4
    between = PhasedGenerator(expert(3.0), phases, [expert(1.0), expert(2.0)], levels=[0.9, 0.65, 0.59, 0.1])
    assert [between.denoiser_at(level).mean for level in between.levels] == [1.0, 1.0, 2.0, 3.0]
    first = PhasedGenerator(expert(1.0), phases)
    assert (first.levels, first.end, first.first_trained) == ((0.9, 0.8), 0.6, 0)
    assert first(torch.randn(1, 2, 1, 1, 1)).item() == 1.0
    assert "phase 1 of 3" in first.describe()
    with pytest.raises(ArgumentError, match="at most 2 experts"):
        PhasedGenerator(expert(1.0), phases, [expert(1.0)] * 3)


@pytest.mark.parametrize(
    ("schedule", "end", "level"), [(FlowSchedule(), 0.4, 0.7), (EDMSchedule(), 1.0, 3.0), (DDPM, 300.0, 600.0)]
)
def test_noise_by_way_of_the_phases_end_is_noise_at_once(schedule: Any, end: float, level: float) -> None:
    """Samples of a mixture, noised to the phase's end and from there further, have the mixture's density at the level:
    so a phase compares x0 noised at once. Noise that x0 implies, as Euler's steps have it, would give another density.
    """
    draws = torch.Generator().manual_seed(0)
    count = 200_000
    which = torch.multinomial(TEACHER_1D.weights, count, replacement=True, generator=draws)
    x0 = TEACHER_1D.means[which, 0] + TEACHER_1D.stds[which] * torch.randn(count, generator=draws, dtype=F64)
    s, t = (torch.full((1,), each, dtype=F64) for each in (end, level))
    ratio = float(schedule.alpha(t) / schedule.alpha(s))
    added = float(schedule.sigma(t) ** 2 - ratio**2 * schedule.sigma(s) ** 2) ** 0.5

    def noised_by_way(noise: Tensor) -> Tensor:
        x_s = float(schedule.alpha(s)) * x0 + float(schedule.sigma(s)) * noise
        return ratio * x_s + added * torch.randn(count, generator=draws, dtype=F64)

    points = torch.linspace(-3, 3, 13, dtype=F64) * float(schedule.alpha(t) + schedule.sigma(t))
    grid = torch.linspace(float(points[0]) - 20 * float(schedule.sigma(t) + 1), float(points[-1]), 40_001, dtype=F64)
    density = TEACHER_1D.log_density(grid[:, None], float(schedule.alpha(t)), float(schedule.sigma(t))).exp()
    exact = torch.cumulative_trapezoid(density, grid)[torch.searchsorted(grid, points).clamp(1) - 1]

    def distance(x_t: Tensor) -> float:
        found = torch.stack([(x_t <= point).double().mean() for point in points])
        return float((found - exact).abs().max())

    assert distance(noised_by_way(torch.randn(count, generator=draws, dtype=F64))) < 0.004
    assert distance(noised_by_way((x0 - x0.mean()) / x0.std())) > 0.008


@pytest.mark.parametrize("sampler", ["uniform", "shifted", "karras", "lognormal"])
@pytest.mark.parametrize("schedule", [FlowSchedule(), EDMSchedule(), DDPM], ids=["flow", "edm", "ddpm"])
def test_levels_of_a_phase_are_those_above_its_end(sampler: str, schedule: NoiseSchedule) -> None:
    """Of both updates; drawn there as they are without phases."""
    network, end = GaussianDenoiser(0.0, 1.0, schedule), float(schedule.level(torch.tensor(1.0)))
    settings: dict[str, Any] = {"method": "dmd2", "matching_levels.sampler": sampler, "critic_levels.sampler": sampler}
    settings |= {"matching_levels.low": 0.0, "matching_levels.high": 1.0}
    config = load_config(None, {**settings, "discriminator.gan_weight": 0.0, "generator.gan_weight": 0.0})
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000

    def levels_for(student: Student) -> tuple[Tensor, Tensor]:
        networks = Networks(network, network, student)
        critic: Any = critic_update(config, networks)
        own: Any = student_update(config, networks, get_divergence("kl"), DensityRatio())
        return tuple(update.keywords["levels"](schedule, u) for update in (critic, own))  # type: ignore[return-value]

    plain = levels_for(FewStepGenerator(network, (0.9 * schedule.t_max, end)))
    drawn = levels_for(PhasedGenerator(network, Phases((0.9 * schedule.t_max, end), (0, 1))))
    last = levels_for(PhasedGenerator(network, Phases((0.9 * schedule.t_max, end), (0, 1)), [network]))
    shares = torch.linspace(0.01, 0.99, 50, dtype=F64)
    for whole, phase, later in zip(plain, drawn, last, strict=True):
        assert torch.equal(later, whole)
        assert float(whole.min()) < end <= float(phase.min())
        expected, found = (torch.quantile(each, shares) for each in (whole[whole >= end], phase))
        ratios = noise_to_signal(schedule, found), noise_to_signal(schedule, expected)
        torch.testing.assert_close(*ratios, rtol=5e-3, atol=0)


def test_levels_that_all_lie_below_a_phases_end_are_refused() -> None:
    network = GaussianDenoiser(0.0, 1.0, FlowSchedule())
    networks = Networks(network, network, PhasedGenerator(network, Phases((1.0, 0.5), (0, 1))))
    settings = {"method": "diff-instruct", "critic_levels.sampler": "uniform", "critic_levels.high": 0.4}
    with pytest.raises(ConfigError, match=r"critic_levels: its levels end below 0\.5, where this phase ends"):
        critic_update(load_config(None, settings), networks)


RUN: dict[str, Any] = {
    "method": "f-distill",
    "divergence": "reverse-kl",
    "augmentation.weight": 1.0,
    "teacher": "digits-t2i",
    "guidance_scale": 2.0,
    "data": "digit-captions",
    "student": {"steps": 4, "phases": 2, "lora_rank": 4},
    "fake_score": {"lora_rank": 4},
    "generator": {"lr": 1e-2, "gan_weight": 0.0},
    "discriminator.gan_weight": 0.0,
    "iterations": 2,
    "batch_size": 4,
    "critic_steps": 1,
    "segment.weight": 0.5,
    "ema": {"decays": [0.5], "export": 0.5},
    "log": {"samples_every": 0, "checkpoint_every": 1, "tracker": "none"},
}


def test_a_segment_of_the_last_step_ends_where_the_next_phase_begins() -> None:
    """Intra-segment guidance of the first phase's second step; of the last phase's last step the end is the image."""
    run = build(load_config("digits-t2i", RUN), torch.device("cpu"))
    batches: Any = Batches(run, TrainingData(FixedSamples(torch.zeros(4, 4, 2, 2), torch.zeros(4)), None), iter([]))
    ends = [batches._with_segment({"rollout": Rollout((level,))})["segment"].end for level in (999.0, 749.0)]
    assert ends == [749.0, 499.0]
    assert PhasedGenerator(expert(2.0), Phases(LEVELS, (0, 2)), [expert(1.0)]).end == 0.0


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The students of both phases of a run."""
    folder = tmp_path_factory.mktemp("phases")
    first = distill("digits-t2i", output=folder / "one", **RUN)
    second = distill("digits-t2i", output=folder / "two", **RUN, **{"student.previous_phase": str(folder / "one")})
    return [first, second]


def test_a_phase_leaves_the_earlier_experts_alone(phases: list[Path]) -> None:
    first, second = (load_file(folder / "phase-1.safetensors") for folder in phases)
    own = load_file(phases[1] / "phase-2.safetensors")
    assert first.keys() == second.keys() == own.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], own[name]) for name in first)
    assert all(float(value.abs().max()) > 0 for name, value in own.items() if "lora_B" in name)
    assert not (phases[0] / "phase-2.safetensors").exists()
    assert read_lora(phases[1] / "phase-2.safetensors").keys() == {name.rpartition(".lora_")[0] for name in own}
    assert load_student(phases[0]).levels == (999.0, 749.0)


def test_a_resumed_phase_is_the_uninterrupted_one(phases: list[Path], tmp_path: Path) -> None:
    settings = {**RUN, "student.previous_phase": str(phases[0].parent)}
    shutil.copytree(phases[1].parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(last)
    student = distill("digits-t2i", output=tmp_path / "run", resume=True, **settings)
    expected, found = (load_file(folder / "phase-2.safetensors") for folder in (phases[1], student))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.thorough  # tests/training/test_sharding.py shares frozen weights by day
def test_distributed_experts_are_trained_alike(phases: list[Path], tmp_path: Path) -> None:
    """Frozen weights that are shards, as with FSDP over processes; here of one process that offloads them."""
    settings = {**RUN, "student.previous_phase": str(phases[0].parent), "offload_frozen": True}
    student = distill("digits-t2i", output=tmp_path / "run", **settings)
    for name in ("phase-1.safetensors", "phase-2.safetensors"):
        expected, found = (load_file(folder / name) for folder in (phases[1], student))
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=2e-4)


def test_the_cards_code_draws_what_the_student_does(phases: list[Path]) -> None:
    """In plain diffusers: the pipeline of the base, whose adapters change on the way."""
    text = (phases[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("path/to/this/folder", str(phases[1])).replace("a prompt", "a bold three")
    code = code.replace(".images[0]", ".images").replace("pipeline(prompt", "pipeline(generator=draws, **kind, prompt")
    names: dict[str, Any] = {"draws": torch.Generator().manual_seed(3), "kind": {"output_type": "latent"}}
    exec(code, names)
    student, pipeline = load_student(phases[1]), names["pipeline"]
    noise = torch.randn(4, 1, *student.sample_shape, generator=torch.Generator().manual_seed(3)).transpose(0, 1)
    maker = open_maker(phases[1], torch.device("cpu"))
    condition = maker.text.encode(["a bold three"])  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = student(noise, condition)
        first_alone = PhasedGenerator(student.denoisers[0], Phases(student.levels, (0,)))(noise, condition)
    torch.testing.assert_close(names["image"], expected, rtol=1e-4, atol=1e-4)
    assert float((first_alone - expected).abs().max()) > 1e-2
    assert isinstance(pipeline, DiffusionPipeline)


def test_other_numbers_of_steps_are_taken_by_the_experts_of_their_intervals(phases: list[Path]) -> None:
    with pytest.warns(UserWarning, match="takes 2 steps, but has learnt to take 4"):
        two = load_student(phases[1], steps=2)
    assert isinstance(two, PhasedGenerator)
    assert [two.denoiser_at(level) is two.denoiser for level in two.levels] == [False, True]
    assert load_student(phases[1])(torch.randn(1, 4, *two.sample_shape), _condition(phases[1])).isfinite().all()


def _condition(folder: Path) -> Any:
    maker: Any = open_maker(folder, torch.device("cpu"))
    return maker.text.encode(["a thin one"])


def test_the_demo_draws_it_beside_its_guided_teacher(phases: list[Path], tmp_path: Path) -> None:
    """Each as `generate` does, enlarged; the teacher with the guidance that the student has learnt."""
    pair = open_pair(str(phases[1]), None, torch.device("cpu"))
    assert (pair.reason, list(pair.steps)) == ("", [4])
    student, teacher = draw(pair, Wish(seed=5, images=2, prompt="a three", teacher_steps=2))
    assert teacher is not None
    assert (student.evaluations, teacher.evaluations) == (4, 2 * 3)
    guided: dict[str, Any] = {"num_steps": 2, "guidance_scale": 2.0}
    for drawn, checkpoint, options in ((student, phases[1], {}), (teacher, "digits-t2i", guided)):
        folder = tmp_path / str(checkpoint).replace("/", "-")
        generate(checkpoint, num_images=2, output=folder, seed=5, prompts=["a three"], device="cpu", **options)
        for number, image in enumerate(drawn.images):
            expected = np.array(Image.open(folder / f"{number:06d}.png"))
            assert np.array_equal(np.array(image)[8::16, 8::16], expected)


def test_the_experts_are_exported_one_file_each(phases: list[Path], tmp_path: Path) -> None:
    notes = export_student(phases[1], "comfy-lora", tmp_path / "fast.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fast-phase-1.safetensors",
        "fast-phase-2.safetensors",
        "fast.json",
    ]
    assert "fast-phase-1.safetensors for steps 1 to 2, fast-phase-2.safetensors for steps 3 to 4" in notes[0]
    nodes = json.loads((tmp_path / "fast.json").read_text())
    first, second = (node["inputs"] for node in nodes.values() if node["class_type"] == "SamplerCustom")
    sigmas = [nodes[each["sigmas"][0]]["inputs"]["sigmas"].split(", ") for each in (first, second)]
    assert [len(each) for each in sigmas] == [3, 3]
    assert sigmas[0][-1] == sigmas[1][0]
    assert sigmas[1][-1] == "0"
    assert (first["add_noise"], second["add_noise"]) == (True, False)
    assert nodes[second["latent_image"][0]]["inputs"] is not None
    assert nodes[second["latent_image"][0]]["class_type"] == "SamplerCustom"
    loaded = [nodes[each["model"][0]]["inputs"]["lora_name"] for each in (first, second)]
    assert loaded == ["fast-phase-1.safetensors", "fast-phase-2.safetensors"]
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "fast-phase-1.safetensors"))
    with pytest.raises(ArgumentError, match=r"has 2 experts on one base.*expected lora or comfy-lora"):
        export_student(phases[1], "comfy", tmp_path / "whole.safetensors")


def test_what_is_no_earlier_phase_is_refused(phases: list[Path], tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            distill("digits-t2i", output=tmp_path / "run", **{**RUN, **settings})
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    two = {"student.previous_phase": str(phases[1])}
    assert "has all its 2 phases; there is none left to train" in refused(**two)
    other = refused(**{"student.previous_phase": str(phases[0]), "student.steps": 6})
    assert "phases that begin at 999, 499 of the levels 999, 749, 499, 249; expected 999, 499 of 999, 832" in other
    assert "no such folder" in refused(**{"student.previous_phase": str(tmp_path / "none")})
    assert "text-to-image pipeline, which this teacher is not; expected 1" in refused(
        teacher="digits", data="digits", guidance_scale=1.0, student_level=None, **{"augmentation.weight": 0.0}
    )
    started = {"student": {"checkpoint": str(phases[1]), "steps": 4}}
    assert "has experts for phases, which are no one network" in refused(**started)
    with pytest.raises(ArgumentError, match="has experts that take one after another of the steps"):
        open_maker(phases[1], torch.device("cpu"), Sampling(sampler="pipeline"))


def test_damaged_experts_are_refused(phases: list[Path], tmp_path: Path) -> None:
    copied = shutil.copytree(phases[1], tmp_path / "student")
    facts = json.loads((copied / "fdistill_student.json").read_text())
    (copied / "fdistill_student.json").write_text(json.dumps({**facts, "files": {}}))
    tensors = load_file(copied / "phase-2.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, copied / "phase-2.safetensors")
    with pytest.raises(CheckpointError, match="expected the adapters of a phase that was trained on the same teacher"):
        load_student(copied)
    (copied / "phase-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has 1 files phase-N\.safetensors, which are not the phases"):
        load_student(copied)

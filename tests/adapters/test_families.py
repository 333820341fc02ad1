"""Every family of checkpoints: x0 as its own pipeline computes it, five iterations, export, reload, the same sample."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor

from fdistill import OneStepPipeline, distill, generate, load_student, load_teacher
from fdistill.adapters.checkpoint import find_network
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.losses import denoising_weight
from fdistill.training import sample_grids
from support.denoisers import tiny_unet
from support.families import FAMILIES, tiny_vae
from support.thorough import at_night

SETTINGS: dict[str, Any] = {
    "data": None,
    "method": "diff-instruct",
    "batch_size": 4,
    "iterations": 5,
    "student_level": None,
    "log.tracker": "none",
    "log.samples_every": 0,
    "generator.lr": 1e-3,
}
#: At the last timestep x0 = (x_t - sigma eps) / alpha has 1 / alpha = 158 times the rounding error of float32, where
#: 1e-5 is out of reach for anyone; these start where it is 12 times.
EPS = ("ddpm", "learned-variance", "class-conditional", "dit")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: write(folder / name) for name, (write, _) in FAMILIES.items()}


# By day, pixels without classes in a pipeline of diffusers, and latents of classes in our own.
@pytest.mark.parametrize("name", at_night(FAMILIES, lambda name: name not in ("ddpm", "edm2-latent")))
def test_five_iterations_export_reload_sample(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Tensor, Tensor]] = []
    images_of = sample_grids._images

    def recorded(run: Any, x0: Tensor) -> Tensor:
        decoded = x0 if run.latents is None else run.latents.decode(x0)
        drawn.append((x0, (decoded / 2 + 0.5).clamp(0, 1)))
        return images_of(run, x0)

    monkeypatch.setattr(sample_grids, "_images", recorded)
    level = 700 if name in EPS else None
    student = distill(
        "digits", output=tmp_path / "run", teacher=str(checkpoints[name]), **SETTINGS | {"student_level": level}
    )
    trained, images = drawn[-1]  # what the exported weights draw for the grid

    generator = load_student(student)
    noise = torch.from_numpy(np.stack([_philox(i, generator.noise_shape()) for i in range(len(trained))]))
    labels = torch.arange(len(noise)) % generator.num_classes if generator.num_classes else None
    with torch.no_grad():
        torch.testing.assert_close(generator(noise, labels), trained, rtol=1e-5, atol=1e-5)
    untrained = load_teacher(checkpoints[name])
    t = torch.full((len(noise),), generator.levels[0])
    start = untrained.schedule.start(t).reshape(-1, 1, 1, 1) * noise
    assert not torch.allclose(untrained.denoise(start, t, labels), trained, atol=1e-3)  # type: ignore[arg-type]

    facts = json.loads((student / "fdistill_student.json").read_text())
    assert facts["pipeline"] == FAMILIES[name][1]
    pipeline = DiffusionPipeline.from_pretrained(student)
    assert type(pipeline).__name__ == FAMILIES[name][1]
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *a, **k: noise)
    call = dict(facts["call"])
    if labels is not None:
        call["class_labels"] = labels.tolist()
    if labels is None or facts["pipeline"] == "ConsistencyModelPipeline":
        call["batch_size"] = len(noise)
    result = pipeline(**call, output_type="np").images
    np.testing.assert_allclose(result, images.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-5)

    again = pipeline(**call, output_type="np").images
    np.testing.assert_array_equal(again, result)

    made = generate(student, num_images=2, output=tmp_path / "images", class_labels=[3] if labels is not None else None)
    with Image.open(made / "000001.png") as picture:
        assert picture.size == tuple(result.shape[2:0:-1])

    card = (student / "README.md").read_text()
    assert f"| teacher | {checkpoints[name]} |" in card
    assert "samples.png" in card
    assert "iterations: 5" in card
    assert (student / "samples.png").is_file()


def _philox(index: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Noise of seed 0 and this index, as documented."""
    bits = np.random.Philox(key=np.array([0, index], dtype=np.uint64))
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("name", ["ddpm", "ddpm-v", "ddpm-x0", "learned-variance", "class-conditional"])
def test_x0_is_what_the_pipelines_own_scheduler_says(name: str, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints[name]
    _, network = find_network(folder)
    unet = UNet2DModel.from_pretrained(network)
    scheduler = DDIMScheduler.from_pretrained(folder if network == folder else folder / "scheduler", clip_sample=False)
    scheduler.set_timesteps(1000)
    denoiser = load_teacher(folder)
    torch.manual_seed(0)
    for timestep in (5, 250, 600):
        x_t = torch.randn(3, *denoiser.sample_shape)
        labels = torch.tensor([1, 5, 9]) if denoiser.num_classes else None
        raw = unet(x_t, timestep, labels).sample[:, : x_t.shape[1]]
        expected = scheduler.step(raw, timestep, x_t).pred_original_sample
        x0 = denoiser.denoise(x_t, torch.full((3,), float(timestep)), labels)
        torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)


def test_dit_is_its_transformer_and_ddim(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["dit"]
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1000)
    denoiser = load_teacher(folder)
    assert denoiser.num_classes == denoiser.null_class == 10
    names = tuple(denoiser.feature_shapes)
    for timestep in (5, 250, 600):
        x_t, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, 10, 9])
        t = torch.full((3,), float(timestep))
        raw = transformer(x_t, t, labels).sample[:, :4]
        expected = scheduler.step(raw, timestep, x_t).pred_original_sample
        x0, features = denoiser.denoise(x_t, t, labels, names)
        torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)
        assert {key: tuple(value.shape[1:]) for key, value in features.items()} == denoiser.feature_shapes
        hidden = transformer.pos_embed(x_t)
        for block, name in zip(transformer.transformer_blocks, names, strict=True):
            hidden = block(hidden, timestep=t, class_labels=labels)
            torch.testing.assert_close(features[name].flatten(2).transpose(1, 2), hidden)
    # In training mode labels stay: diffusers would drop a tenth of them.
    assert torch.equal(denoiser.train().denoise(x_t, t, labels), denoiser.eval().denoise(x_t, t, labels))


def test_dit_features_stop_at_the_last_one(checkpoints: dict[str, Path]) -> None:
    denoiser = load_teacher(checkpoints["dit"]).requires_grad_(True)
    x_t, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0]), torch.tensor([1, 2])
    features = denoiser.features(x_t, t, labels, ("block0",))
    features["block0"].sum().backward()
    blocks: Any = denoiser.network.transformer_blocks  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in blocks[1].parameters())
    prediction, _ = denoiser.predict(x_t, t, labels, ("block0",), output_grad=False)
    assert not prediction.output.requires_grad


def test_sit_predicts_data_minus_noise_and_counts_time_backwards(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["sit"]
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    denoiser = load_teacher(folder)
    x_t, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, 10, 9])
    for level in (0.1, 0.5, 1.0):
        t = torch.full((3,), level)
        velocity = transformer(x_t, 1 - t, labels).sample[:, :4]
        # x_t = (1 - t) x0 + t eps and velocity = x0 - eps give x0 = x_t + t velocity.
        torch.testing.assert_close(denoiser.denoise(x_t, t, labels), x_t + level * velocity, rtol=1e-5, atol=1e-5)


def test_flow_x0_is_where_the_schedulers_last_step_ends(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["flow"]
    unet = UNet2DModel.from_pretrained(folder / "unet")
    denoiser = load_teacher(folder)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    for level in (0.2, 0.7, 1.0):
        scheduler.set_timesteps(sigmas=[level])
        x_t, labels = torch.randn(3, *denoiser.sample_shape), torch.tensor([1, 0, 9])
        raw = unet(x_t, scheduler.timesteps[0], labels).sample
        expected = scheduler.step(raw, scheduler.timesteps[0], x_t).prev_sample
        x0 = denoiser.denoise(x_t, torch.full((3,), level), labels)
        torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)


def test_learned_variances_are_cut_off(checkpoints: dict[str, Path]) -> None:
    teacher = load_teacher(checkpoints["learned-variance"])
    assert teacher.network.config.out_channels == 3  # type: ignore[union-attr]
    assert load_teacher(checkpoints["dit"]).network.config.out_channels == 4  # type: ignore[union-attr]


def test_a_latent_student_decodes_as_its_autoencoder_does(checkpoints: dict[str, Path]) -> None:
    from fdistill.adapters.checkpoint import resolve_checkpoint
    from fdistill.teachers.autoencoder import attach_latent_space

    for name in ("dit", "edm2-latent"):
        checkpoint = resolve_checkpoint(checkpoints[name])
        denoiser = load_teacher(checkpoints[name])
        latents = attach_latent_space(denoiser, checkpoint, None)
        vae = AutoencoderKL.from_pretrained(checkpoints[name] / "vae")
        samples, images = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
        assert latents is not None
        assert latents.factor == 2
        mean, std = latents.moments(images).chunk(2, dim=1)
        posterior = vae.encode(images / 2 + 0.5 if name == "edm2-latent" else images).latent_dist
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close(std, posterior.std)
        scale, bias = ([0.5] * 4, [0.0] * 4)
        if name == "edm2-latent":
            scale, bias = [0.1, 0.11, 0.13, 0.15], [-0.7, -0.35, 0.02, 0.3]
        for channel in range(4):
            z = (samples[:, channel] - bias[channel]) / scale[channel]
            torch.testing.assert_close(latents.scaling.to_latents(samples)[:, channel], z)
        expected = vae.decode(latents.scaling.to_latents(samples)).sample
        if name == "edm2-latent":
            expected = expected * 2 - 1
        torch.testing.assert_close(latents.decode(samples), expected)
        torch.testing.assert_close(latents.scaling.to_samples(latents.scaling.to_latents(samples)), samples)


def test_students_may_start_at_an_earlier_timestep(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    settings = SETTINGS | {"student_level": 399, "iterations": 1}
    student = distill("digits", output=tmp_path / "run", teacher=str(checkpoints["ddpm"]), **settings)
    pipeline = DDPMPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.num_train_timesteps == 400
    images = pipeline(
        batch_size=3, num_inference_steps=1, generator=torch.Generator().manual_seed(3), output_type="np"
    ).images
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    x0 = load_student(student)(noise)
    expected = (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=1e-5)
    # x0 = (noise - sigma eps) / alpha with the coefficients of the teacher's own timestep 399
    teacher = load_teacher(checkpoints["ddpm"])
    alpha = teacher.schedule.alpha(torch.tensor(399.0))
    own = load_student(student).denoiser.schedule.alpha(torch.tensor(399.0))
    torch.testing.assert_close(own, alpha, rtol=1e-5, atol=0)


def test_a_few_step_student_in_our_pipeline(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    settings = SETTINGS | {"method": "f-distill", "divergence": "rkl", "data": "teacher-samples", "iterations": 2}
    settings |= {"student_level": [40.0, 2.5], "teacher_samples.count": 8, "teacher_samples.num_steps": 2}
    student = distill("digits", output=tmp_path / "run", teacher=str(checkpoints["edm-ddpmpp"]), **settings)
    pipeline = DiffusionPipeline.from_pretrained(student)
    labels = [0, 3, 9]
    images = pipeline(class_labels=labels, generator=torch.Generator().manual_seed(1), output_type="pt").images
    noise = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x0 = load_student(student)(noise, torch.tensor(labels))
    torch.testing.assert_close(images, (x0 / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    pictures = pipeline(class_labels=torch.tensor(labels)).images
    assert [picture.size for picture in pictures] == [(8, 8)] * 3


def test_our_pipeline_says_what_labels_it_wants(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, arguments, message in (
        ("edm-ddpmpp", {}, r"expected labels in \[0, 10\), got None"),
        ("edm-ddpmpp", {"class_labels": [3, 10]}, r"expected labels in \[0, 10\), got \[3, 10\]"),
        ("edm-ncsnpp", {"class_labels": [1]}, "this student takes no class labels; expected None"),
    ):
        network: Any = load_teacher(checkpoints[name]).network
        pipeline = OneStepPipeline(network, student={"levels": [80.0]})
        with pytest.raises(ArgumentError, match=message):
            pipeline(**arguments)


def test_in_bfloat16_a_level_stays_what_it_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """bfloat16 knows no 999 and no 443: only what the network is fed may be rounded."""
    for level in (999, 443):
        settings = SETTINGS | {"student_level": level, "iterations": 1}
        output = tmp_path / str(level)
        student = distill("digits", output=output, teacher=str(checkpoints["ddpm-v"]), **settings)
        generator = load_student(student)
        noise = torch.randn(4, 1, 8, 8)
        exact = generator(noise)
        generator.to(torch.bfloat16)
        assert (generator(noise) - exact).abs().max() < 0.1
        assert (generator(noise.to(torch.bfloat16)) - exact).abs().max() < 0.1
    student = distill("digits", output=tmp_path / "own", teacher=str(checkpoints["class-conditional"]), **SETTINGS)
    images = OneStepPipeline.from_pretrained(student, torch_dtype=torch.bfloat16)(class_labels=[1, 2]).images
    assert len(images) == 2


def test_latent_unets_keep_their_autoencoder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    tiny_unet(in_channels=4, out_channels=4).save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    tiny_vae().save_pretrained(folder / "vae")
    settings = SETTINGS | {"student_level": 500, "student.network": {"block_out_channels": [8, 12]}}
    student = distill("digits", output=tmp_path / "run", teacher=str(folder), **settings)
    assert OneStepPipeline.from_pretrained(student)(class_labels=[3], output_type="pt").images.shape == (1, 3, 16, 16)
    (folder / "vae").rename(folder / "gone")
    (folder / "model_index.json").write_text(json.dumps({"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(CheckpointError, match="copy it into vae/"):
        distill("digits", output=tmp_path / "none", teacher=str(folder), **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_a_family_is_the_error_of_its_networks_output(name: str, checkpoints: dict[str, Path]) -> None:
    """x0 = skip x_t + out output, so that the weight of the x0-error must be 1 / out^2."""
    denoiser = load_teacher(checkpoints[name])
    schedule = denoiser.schedule
    t = schedule.t_min + torch.tensor([0.1, 0.5, 0.9]) * (schedule.t_max - schedule.t_min)
    out = denoiser.preconditioning(t).out
    weight = denoising_weight(
        denoiser.loss_weighting, schedule.alpha(t), schedule.sigma(t), sigma_data=denoiser.sigma_data
    )
    expected = torch.ones_like(t) if out is None else 1 / out.square()
    # A consistency model's `out` is EDM's only far above its smallest level.
    torch.testing.assert_close(weight, expected, rtol=1e-2 if name == "consistency" else 1e-4, atol=0)

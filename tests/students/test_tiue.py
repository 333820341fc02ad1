"""The generator with one encoder and many decoders, against the network's own forward and diffusers' DDIM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from fdistill.adapters import set_null_class, unet2d_condition, wrap
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.unet_blocks import Encoded, decode, embed, encode
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition, TextCondition
from fdistill.denoiser import Denoiser, LatentScaling
from fdistill.losses import noise_kl_loss
from fdistill.noise import FlowSchedule
from fdistill.students.lora import lora_copy
from fdistill.students.tiue import TiUEGenerator, accepted_condition, composition, leading_levels
from fdistill.students.tiue_pipeline import TiUEPipeline, tiue_pipeline
from fdistill.teachers.text_encoders import text_components
from support.denoisers import GaussianDenoiser, tiny_unet
from support.families import randomised, tiny_vae
from support.text_families import sd15, sd21v, sdxl, tiny_condition_unet
from support.unets import XL

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = (751.0, 501.0, 251.0, 1.0)


def ddim(prediction_type: str = "epsilon", **changes: Any) -> DDIMScheduler:
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **SD_BETAS, **changes}
    return DDIMScheduler(prediction_type=prediction_type, **settings)


def wrapped(network: Any, scheduler: Any) -> Denoiser:
    return wrap(network, scheduler_config(scheduler)).eval()


def a_condition(denoiser: Denoiser, count: int) -> Condition | None:
    """Another one for each sample."""
    torch.manual_seed(5)
    if denoiser.text_shapes is not None:
        return TextCondition({name: torch.randn(count, *shape) for name, shape in denoiser.text_shapes.items()})
    return torch.arange(count) % denoiser.num_classes if denoiser.num_classes else None


def family(name: str, prediction_type: str = "epsilon") -> Denoiser:
    """A tiny network of each class, whose output every part of its condition has a say in."""
    if name == "unet2d":
        return wrapped(randomised(tiny_unet()), ddim(prediction_type))
    changes = XL if name == "sdxl" else {}
    return wrapped(tiny_condition_unet(**changes), ddim(prediction_type))


def sequential(generator: TiUEGenerator, noise: Tensor, condition: Condition | None) -> Tensor:
    """Outputs [B, K, ...] of K decoders, one after another."""
    denoiser: Any = generator.denoiser
    unet = denoiser.network
    accepted = accepted_condition(unet, condition, generator.num_classes)
    encoded: Encoded | None = None
    outputs = []
    for level in generator.decoder_levels:
        t = torch.full((len(noise),), level)
        timestep = denoiser.parametrisation.timestep(t)
        if encoded is None:
            network_input = denoiser.network_input(denoiser.schedule.start(t).reshape(-1, 1, 1, 1) * noise, t)
        embedding, text = embed(unet, timestep, accepted, network_input.dtype)
        if encoded is None:
            encoded = encode(unet, network_input, embedding, text)
        outputs.append(decode(unet, encoded, embedding, text, timestep))
    return torch.stack(outputs, dim=1)


# --- parallel and sequential decoders


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["unet2d", "sd", "sdxl"])
def test_parallel_decoders_are_the_sequential_ones(name: str, prediction_type: str) -> None:
    denoiser = family(name, prediction_type)
    generator = TiUEGenerator(denoiser, LEVELS)
    assert generator.noise_shape() == denoiser.sample_shape
    condition = a_condition(denoiser, 3)
    noise = torch.randn(3, *generator.sample_shape)
    with torch.no_grad():
        outputs = sequential(generator, noise, condition)
        torch.testing.assert_close(generator.outputs(noise, condition), outputs, rtol=1e-5, atol=1e-5)
        x0, predicted = generator.sample_with_predictions(noise, condition)
        assert torch.equal(generator(noise, condition), x0)
        other = generator.outputs(noise, rolled(condition))
    z0, eps = stepped(ddim(prediction_type), outputs, noise)
    torch.testing.assert_close(x0, z0, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(predicted, eps, rtol=1e-5, atol=1e-4)
    # Decoders differ from one another, samples too, and by their conditions: nothing above holds for want of contrast.
    assert (outputs[:, 0] - outputs[:, 1]).abs().max() > 1e-3
    assert (outputs - other).abs().amax(dim=(2, 3, 4)).min() > 1e-3


def rolled(condition: Condition | None) -> Condition | None:
    index = torch.tensor([1, 2, 0])
    assert condition is not None
    return condition.rows(index) if isinstance(condition, TextCondition) else condition[index]


def test_a_decoder_sees_its_level_and_the_encoder_the_first() -> None:
    """The first decoder's output is the whole network's at the first level; no other's is the network's at its own."""
    denoiser: Any = family("sd")
    condition = a_condition(denoiser, 2)
    noise = torch.randn(2, *denoiser.sample_shape)
    outputs = TiUEGenerator(denoiser, LEVELS).outputs(noise, condition)
    for k, level in enumerate(LEVELS):
        t = torch.full((2,), level)
        whole = denoiser.predict(denoiser.network_input(noise, t), t, condition)[0].output
        assert torch.allclose(outputs[:, k], whole, rtol=1e-5, atol=1e-5) == (k == 0)


def test_of_one_level_it_is_one_ddim_step() -> None:
    denoiser = family("sd")
    condition, noise = a_condition(denoiser, 2), torch.randn(2, *denoiser.sample_shape)
    generator = TiUEGenerator(denoiser, (999.0,))
    alpha, sigma = (getattr(denoiser.schedule, name)(torch.tensor(0.0)) for name in ("alpha", "sigma"))
    x0 = denoiser.denoise(noise, torch.full((2,), 999.0), condition)
    eps = generator.outputs(noise, condition)[:, 0]
    torch.testing.assert_close(generator(noise, condition), alpha * x0 + sigma * eps, rtol=1e-5, atol=1e-4)


# --- the composition


def stepped(scheduler: DDIMScheduler, outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What diffusers' own steps make of outputs [B, K, ...] in float64, and the eps-predictions in them."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(outputs.shape[1])
    z, predicted = noise.double(), []
    for k, timestep in enumerate(scheduler.timesteps):
        step = scheduler.step(outputs[:, k].double(), int(timestep), z)
        alpha_cumprod = scheduler.alphas_cumprod[timestep]
        predicted.append((z - alpha_cumprod.sqrt() * step.pred_original_sample) / (1 - alpha_cumprod).sqrt())
        z = step.prev_sample
    return z.to(noise.dtype), torch.stack(predicted, dim=1).to(noise.dtype)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_composition_is_diffusers_ddim(prediction_type: str, schedule: str, count: int) -> None:
    scheduler = ddim(prediction_type, beta_schedule=schedule)
    denoiser = wrapped(tiny_unet(), scheduler)
    levels = leading_levels(denoiser.schedule, count)
    scheduler.set_timesteps(count)
    assert list(levels) == scheduler.timesteps.tolist()
    torch.manual_seed(0)
    noise, outputs = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.randn(2, count, 1, 8, 8, dtype=torch.float64)
    z0, predicted = stepped(scheduler, outputs, noise)
    made = torch.einsum("rp,bp...->br...", composition(denoiser, levels), torch.cat([noise[:, None], outputs], dim=1))
    torch.testing.assert_close(made[:, -1], z0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made[:, :-1], predicted, rtol=1e-9, atol=1e-9)


def test_composition_has_the_published_coefficients() -> None:
    rows = composition(wrapped(tiny_unet(), ddim()), LEVELS)
    expected = torch.tensor([4.2346, -2.492, -0.925, -0.657, -0.012], dtype=torch.float64)
    torch.testing.assert_close(rows[-1], expected, rtol=0, atol=6e-4)
    torch.testing.assert_close(rows[:-1], torch.eye(5, dtype=torch.float64)[1:], rtol=0, atol=1e-12)


def test_composition_of_a_flow_is_eulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    denoiser = wrapped(tiny_unet(), scheduler)
    levels = (1.0, 0.75, 0.5, 0.25)
    z = torch.eye(5, dtype=torch.float64)[0]
    for k, (level, below) in enumerate(zip(levels, (*levels[1:], FlowSchedule().t_min), strict=True)):
        z = z + (below - level) * torch.eye(5, dtype=torch.float64)[k + 1]
    torch.testing.assert_close(composition(denoiser, levels)[-1], z, rtol=1e-12, atol=1e-12)


def test_preconditioned_networks_have_decoders_too() -> None:
    """The embedded digits teacher is of this kind: level sigma, an input scale, and noise of that size."""
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.75)
    denoiser = wrapped(randomised(tiny_unet()), scheduler)
    generator = TiUEGenerator(denoiser, (80.0, 2.5))
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    outputs = sequential(generator, noise, labels)
    torch.testing.assert_close(generator.outputs(noise, labels), outputs, rtol=1e-5, atol=1e-5)
    _, skip, out = denoiser.preconditioning(torch.tensor([80.0, 2.5]))
    assert skip is not None
    assert out is not None
    first = skip[0] * 80 * noise + out[0] * outputs[:, 0]
    z = first + 2.5 / 80 * (80 * noise - first)
    second = skip[1] * z + out[1] * outputs[:, 1]
    expected = second + 0.002 / 2.5 * (z - second)
    torch.testing.assert_close(generator(noise, labels), expected, rtol=1e-4, atol=1e-5)


# --- training


@pytest.mark.parametrize("name", ["unet2d", "sd", "sdxl"])
def test_gradients_reach_every_parameter(name: str) -> None:
    generator = TiUEGenerator(family(name), LEVELS)
    noise = torch.randn(2, *generator.sample_shape)
    x0, predicted = generator.sample_with_predictions(noise, a_condition(generator.denoiser, 2))
    (x0.square().mean() + noise_kl_loss(predicted).mean()).backward()
    missing = [key for key, value in generator.named_parameters() if value.grad is None or not value.grad.any()]
    assert not missing


def test_gradients_are_the_sequential_twins() -> None:
    generator = TiUEGenerator(family("sd", "v_prediction"), LEVELS)
    noise, condition = torch.randn(2, *generator.sample_shape), a_condition(generator.denoiser, 2)
    parameters = dict(generator.named_parameters())
    parallel = torch.autograd.grad(generator.outputs(noise, condition).square().mean(), list(parameters.values()))
    twin = torch.autograd.grad(sequential(generator, noise, condition).square().mean(), list(parameters.values()))
    for key, ours, theirs in zip(parameters, parallel, twin, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6, msg=key)


def test_adapters_and_activation_checkpointing_change_no_sample() -> None:
    base = family("sd").requires_grad_(False)
    adapted = lora_copy(base, 2, adapter="student", setting="student")
    noise, condition = torch.randn(2, *base.sample_shape), a_condition(base, 2)
    expected = TiUEGenerator(base, LEVELS)(noise, condition)
    student = TiUEGenerator(adapted, LEVELS)
    torch.testing.assert_close(student(noise, condition), expected, rtol=1e-5, atol=1e-5)
    adapters = [value for value in student.parameters() if value.requires_grad]
    plain = torch.autograd.grad(student(noise, condition).square().mean(), adapters)
    adapted.network.enable_gradient_checkpointing()  # type: ignore[operator, union-attr]
    again = torch.autograd.grad(student(noise, condition).square().mean(), adapters)
    assert any(gradient.any() for gradient in plain)
    for first, second in zip(plain, again, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_bfloat16_networks_make_float32_samples() -> None:
    exact = TiUEGenerator(family("sd"), LEVELS)
    noise, condition = torch.randn(2, *exact.sample_shape), a_condition(exact.denoiser, 2)
    expected, predicted = exact.sample_with_predictions(noise, condition)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = exact.sample_with_predictions(noise, condition)
    low = TiUEGenerator(family("sd").bfloat16(), LEVELS).sample_with_predictions(noise, condition)
    for x0, eps in (mixed, low):
        assert x0.dtype == eps.dtype == torch.float32
        assert (x0 - expected).norm() < 0.05 * expected.norm()
        assert (eps - predicted).norm() < 0.05 * predicted.norm()


def test_noise_kl_is_that_of_normal_distributions() -> None:
    torch.manual_seed(0)
    eps = 1.7 * torch.randn(3, 4, 2, 5, 5, dtype=torch.float64) + torch.randn(3, 4, 1, 1, 1, dtype=torch.float64)
    fitted = torch.distributions.Normal(eps.mean(dim=(2, 3, 4)), eps.std(dim=(2, 3, 4)))
    standard = torch.distributions.Normal(torch.zeros(3, 4).double(), torch.ones(3, 4).double())
    expected = torch.distributions.kl_divergence(fitted, standard).mean(dim=1)
    torch.testing.assert_close(noise_kl_loss(eps), expected, rtol=1e-10, atol=0)
    assert noise_kl_loss(eps.bfloat16()).dtype == torch.float32


# --- what it refuses


def test_what_has_no_decoder_or_no_such_levels_is_refused() -> None:
    denoiser = family("unet2d")
    for levels in ((), (1.0, 501.0), (501.0, 501.0), (1000.0, 1.0), (501.0, 0.0)):
        with pytest.raises(ArgumentError, match=r"decoder_levels: expected falling numbers in \(0, 999\]"):
            TiUEGenerator(denoiser, levels)
    with pytest.raises(ArgumentError, match="decoder_levels: 4 levels cannot be spaced over a FlowSchedule"):
        leading_levels(FlowSchedule())
    with pytest.raises(ArgumentError, match="got a GaussianDenoiser"):
        TiUEGenerator(GaussianDenoiser(0.0, 1.0), (1.0,))
    with pytest.raises(ArgumentError, match="takes class labels"):
        TiUEGenerator(denoiser, LEVELS)(torch.randn(2, 1, 8, 8))
    with pytest.raises(ArgumentError, match="got labels; this network wants a TextCondition"):
        TiUEGenerator(family("sd"), LEVELS)(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]))


# --- export


def _text_components(pipeline: DiffusionPipeline) -> dict[str, Any]:
    return {key: value for key, value in pipeline.components.items() if key.startswith(("text_encoder", "tokenizer"))}


@pytest.mark.parametrize("write", [sd15, sd21v, sdxl], ids=lambda write: write.__name__)
def test_a_reloaded_pipeline_makes_the_trainers_images(write: Any, tmp_path: Path) -> None:
    teacher: Any = DiffusionPipeline.from_pretrained(write(tmp_path / "teacher"))
    denoiser = wrapped(teacher.unet, teacher.scheduler)
    denoiser.latent_scaling = LatentScaling((teacher.vae.config.scaling_factor,) * 4, (0.0,) * 4)
    student = TiUEGenerator(denoiser, (801.0, 401.0, 1.0)).eval()
    exported = tiue_pipeline(student, teacher.scheduler, teacher.vae, _text_components(teacher))
    exported.save_pretrained(tmp_path / "student")
    prompts, noise = ["a bold seven", "a thin three"], torch.randn(2, 4, 8, 8)

    only = {"vae": None, "unet": None, "scheduler": None}
    encoders: Any = (
        StableDiffusionXLPipeline(**only, **_text_components(teacher), add_watermarker=False)
        if write is sdxl
        else StableDiffusionPipeline(
            **only,
            **_text_components(teacher),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    with torch.no_grad():
        x0 = student(noise, unet2d_condition.encode_prompts(encoders, prompts, 16))
        images = teacher.vae.decode(x0 / teacher.vae.config.scaling_factor).sample
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(loaded).__name__ == "TiUEPipeline"
    call: dict[str, Any] = {"latents": noise, "output_type": "pt"}
    result = loaded(prompts, num_inference_steps=1, guidance_scale=0.0, **call).images
    torch.testing.assert_close(result, (images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert (result - loaded(prompts[::-1], **call).images).abs().max() > 1e-3
    assert len(loaded("a thin three", generator=torch.Generator().manual_seed(0)).images) == 1
    with pytest.raises(ArgumentError, match="prompt"):
        loaded()
    with pytest.raises(ArgumentError, match="num_inference_steps"):
        loaded(prompts, num_inference_steps=4)
    with pytest.raises(ArgumentError, match="guidance_scale"):
        loaded(prompts, guidance_scale=7.5)
    with pytest.raises(ArgumentError, match="class_labels"):
        loaded(prompts, class_labels=[1, 2])


def test_a_reloaded_pipeline_of_labels_makes_the_trainers_images(tmp_path: Path) -> None:
    denoiser = family("unet2d", "v_prediction")
    set_null_class(denoiser, 9)
    student = TiUEGenerator(denoiser, LEVELS).eval()
    tiue_pipeline(student, ddim("v_prediction"), None, {}).save_pretrained(tmp_path / "student")
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 8])
    with torch.no_grad():
        expected = (student(noise, labels) / 2 + 0.5).clamp(0, 1)
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "student")
    images = loaded(class_labels=labels, latents=noise, output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "student" / "model_index.json").read_text())["_class_name"] == "TiUEPipeline"
    assert diffusers.TiUEPipeline is TiUEPipeline
    assert text_components(Checkpoint("student", tmp_path / "student")) == {}
    for wrong in (None, [9], [-1]):
        with pytest.raises(ArgumentError, match=r"labels in \[0, 9\)"):
            loaded(class_labels=wrong)
    with pytest.raises(ArgumentError, match="prompt"):
        loaded("a seven", class_labels=[1])


def test_a_pipeline_of_neither_draws_as_many_as_asked(tmp_path: Path) -> None:
    denoiser = wrapped(tiny_unet(num_class_embeds=None, in_channels=4, out_channels=4), ddim())
    denoiser.latent_scaling = LatentScaling((0.5,) * 4, (0.1,) * 4)
    vae: AutoencoderKL = tiny_vae()
    student = TiUEGenerator(denoiser, LEVELS).eval()
    tiue_pipeline(student, ddim(), vae, {}).save_pretrained(tmp_path / "student")
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "student")
    noise = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        images = vae.decode((student(noise) - 0.1) / 0.5).sample
    result = loaded(latents=noise, output_type="np").images
    expected = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=1e-4)
    assert len(loaded(batch_size=2).images) == 2
    for count, latents in ((2, noise), (3, noise[:, :3])):
        with pytest.raises(ArgumentError, match="latents"):
            loaded(batch_size=count, latents=latents)


def test_resized_text_students_keep_their_size(tmp_path: Path) -> None:
    teacher: Any = DiffusionPipeline.from_pretrained(sd15(tmp_path / "teacher"))
    denoiser: Any = wrapped(teacher.unet, teacher.scheduler)
    denoiser.latent_scaling = LatentScaling((0.5,) * 4, (0.0,) * 4)
    denoiser.resize(12, 12)
    exported = tiue_pipeline(TiUEGenerator(denoiser, LEVELS), teacher.scheduler, teacher.vae, _text_components(teacher))
    exported.save_pretrained(tmp_path / "student")
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert loaded("a seven", output_type="pt").images.shape == (1, 3, 24, 24)

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from fdistill import load_teacher
from fdistill.adapters.parametrisation import parametrisation_from_scheduler
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import ArgumentError, CheckpointError
from support.denoisers import tiny_unet
from support.unets import ARCHITECTURES


def config_of(scheduler: object) -> dict[str, object]:
    return {"_class_name": type(scheduler).__name__, **scheduler.config}  # type: ignore[attr-defined]


def with_scheduler(unet: UNet2DModel, scheduler: object) -> UNet2DDenoiser:
    return UNet2DDenoiser(unet, parametrisation_from_scheduler(config_of(scheduler)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_walking_the_blocks_is_the_models_own_forward(name: str) -> None:
    torch.manual_seed(0)
    unet = tiny_unet(**ARCHITECTURES[name])
    denoiser = with_scheduler(unet, FlowMatchEulerDiscreteScheduler())
    x_t = torch.randn(4, *denoiser.sample_shape)
    t = torch.tensor([0.1, 0.3, 0.7, 0.99])
    labels = torch.tensor([0, 3, 5, 9]) if denoiser.num_classes else None
    raw = unet(x_t, 1000 * t, labels).sample
    x0, features = denoiser.denoise(x_t, t, labels, tuple(denoiser.feature_shapes))
    assert torch.equal(x0, x_t - t.reshape(-1, 1, 1, 1) * raw)
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == denoiser.feature_shapes
    alone = denoiser.features(x_t, t, labels, tuple(denoiser.feature_shapes))
    assert all(torch.equal(alone[key], value) for key, value in features.items())


def test_without_output_gradients_only_features_have_a_graph() -> None:
    denoiser = with_scheduler(tiny_unet(), FlowMatchEulerDiscreteScheduler())
    x_t = torch.randn(2, 1, 8, 8, requires_grad=True)
    t, labels = torch.tensor([0.2, 0.8]), torch.tensor([1, 2])
    prediction, features = denoiser.predict(denoiser.network_input(x_t, t), t, labels, ("mid",), output_grad=False)
    assert not prediction.output.requires_grad
    assert features["mid"].requires_grad
    full = denoiser.denoise(x_t, t, labels)
    assert torch.equal(full.detach(), prediction.x0(x_t).detach())  # type: ignore[union-attr]
    full.sum().backward()  # type: ignore[union-attr]
    assert x_t.grad is not None
    assert x_t.grad.abs().sum() > 0


def test_consistency_preconditioning_is_the_schedulers_step() -> None:
    unet = tiny_unet()
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.75, clip_denoised=False)
    denoiser = with_scheduler(unet, scheduler)
    labels = torch.tensor([3, 4])
    for steps, position in ((1, 0), (7, 3), (7, 6)):
        scheduler.set_timesteps(steps)
        timestep, sigma = scheduler.timesteps[position], scheduler.sigmas[position]
        sample = torch.randn(2, 1, 8, 8) * sigma
        raw = unet(scheduler.scale_model_input(sample, timestep), timestep, labels).sample
        x0 = denoiser.denoise(sample, sigma.expand(2), labels)
        if steps == 1:  # a single step adds no noise back: its result is the x0-prediction
            expected = scheduler.step(raw, timestep, sample).prev_sample
            torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
        torch.testing.assert_close(x0, c_skip * sample + c_out * raw, rtol=1e-5, atol=1e-5)


def test_edm_preconditioning_is_the_schedulers() -> None:
    unet = tiny_unet()
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    denoiser = with_scheduler(unet, scheduler)
    sample, labels = torch.randn(2, 1, 8, 8) * 3, torch.tensor([3, 4])
    sigma = torch.tensor(2.5)
    raw = unet(scheduler.precondition_inputs(sample, sigma), scheduler.precondition_noise(sigma), labels).sample
    expected = scheduler.precondition_outputs(sample, raw, sigma)
    torch.testing.assert_close(denoiser.denoise(sample, sigma.expand(2), labels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_vp_x0_is_what_ddim_predicts(prediction_type: str, schedule: str) -> None:
    unet = tiny_unet(num_class_embeds=None)
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False)
    denoiser = with_scheduler(unet, scheduler)
    scheduler.set_timesteps(1000)
    for timestep in (1, 250, 700):
        sample = torch.randn(2, 1, 8, 8)
        raw = unet(sample, timestep).sample
        expected = scheduler.step(raw, timestep, sample).pred_original_sample
        x0 = denoiser.denoise(sample, torch.full((2,), float(timestep)))
        torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscretScheduler"}, "did you mean 'FlowMatchEulerDiscreteScheduler'"),
        (config_of(DDPMScheduler()) | {"_class_name": "MyDDPMScheduler"}, "did you mean 'DDPMScheduler'"),
        (config_of(DDPMScheduler()) | {"_class_name": "DDIMPipeline"}, "is not supported"),
        ({"beta_schedule": "linear"}, "is not supported"),
        (config_of(DDPMScheduler()) | {"beta_start": "x"}, "cannot be used"),
        (config_of(DDPMScheduler()) | {"prediction_type": "v_predicton"}, "did you mean 'v_prediction'"),
        (config_of(DDPMScheduler(rescale_betas_zero_snr=True)), "x0 undefined"),
        (config_of(EDMEulerScheduler()) | {"prediction_type": "v_prediction"}, "expected 'epsilon'"),
    ],
)
def test_schedulers_it_cannot_read_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parametrisation_from_scheduler(config)


def test_a_class_conditional_network_wants_labels() -> None:
    denoiser = with_scheduler(tiny_unet(), EDMEulerScheduler())
    with pytest.raises(ArgumentError, match=r"class labels \[B\] in \[0, 10\)"):
        denoiser.denoise(torch.zeros(1, 1, 8, 8), torch.ones(1))


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_broken_checkpoints_say_what_is_wrong(tiny_teacher: Path, tmp_path: Path) -> None:
    truncated = copied(tiny_teacher, tmp_path / "truncated")
    weights = truncated / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_teacher(truncated)

    missing = copied(tiny_teacher, tmp_path / "missing")
    (missing / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_teacher(missing)

    fewer = copied(tiny_teacher, tmp_path / "fewer")
    path = fewer / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("conv_out.bias")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"conv_out\.bias"):
        load_teacher(fewer)

    other = copied(tiny_teacher, tmp_path / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 32]}))
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_teacher(other)

    no_number = '{"_class_name": "CMStochasticIterativeScheduler", "sigma_min": "low"}'
    texts = ("[]", no_number, '{"beta_schedule": 3}', "no")
    for number, text in enumerate(texts):
        odd = copied(tiny_teacher, tmp_path / f"odd-{number}")
        (odd / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(CheckpointError):
            load_teacher(odd)
    odd = copied(tiny_teacher, tmp_path / "odd")
    (odd / "unet" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        load_teacher(odd)

    for number, change in enumerate(({"block_out_channels": []}, {"norm_num_groups": 0}, {"sample_size": "8"})):
        odd = copied(tiny_teacher, tmp_path / f"config-{number}")
        (odd / "unet" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError):
            load_teacher(odd)
    no_scheduler = copied(tiny_teacher, tmp_path / "no-scheduler")
    shutil.rmtree(no_scheduler / "scheduler")
    with pytest.raises(CheckpointError, match="scheduler_config"):
        load_teacher(no_scheduler)


def test_names_that_lead_to_no_teacher_say_so(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'digits'"):
        load_teacher("digit")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="hub gave no model"):
        load_teacher("nobody/no-such-model")
    with pytest.raises(CheckpointError, match=r"expected config\.json of the network"):
        load_teacher(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        load_teacher(tmp_path / "file")
    other = copied(tiny_teacher, tmp_path / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet3DModel"}))
    with pytest.raises(CheckpointError, match="did you mean 'UNet2DModel'"):
        load_teacher(other)


def test_unknown_features_are_refused(tiny_teacher: Path) -> None:
    teacher = load_teacher(tiny_teacher)
    with pytest.raises(ArgumentError, match="did you mean 'mid'"):
        teacher.denoise(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long), ("midd",))


def test_a_loaded_teacher_is_frozen_and_in_eval_mode() -> None:
    teacher = load_teacher("digits")
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.sample_shape == (1, 8, 8)
    assert teacher.num_classes == 10
    size = sum(path.stat().st_size for path in EMBEDDED_TEACHERS["digits"].rglob("*") if path.is_file())
    assert size <= 5 * 2**20

"""Guidance by a second network: its formula, what it keeps, what is refused, and runs and teacher samples with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import Tensor

from fdistill import GuidedDenoiser, distill, generate, load_teacher
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError
from fdistill.commands.dry_run import describe
from fdistill.config.reading import load_config
from fdistill.denoiser import Denoiser
from fdistill.networks import EDM2Network
from fdistill.teachers.guide import open_guide
from fdistill.training.build import build
from fdistill.training.inputs import data_samples
from support.activations import kept_bytes
from support.denoisers import tiny_unet
from support.families import randomised

EDM2: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 10,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}


def edm2(folder: Path, **changes: Any) -> Path:
    randomised(EDM2Network(**(EDM2 | changes))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A conditional teacher without a label for no class, and networks to guide it by (one of another size)."""
    root = tmp_path_factory.mktemp("edm2")
    return {
        "teacher": edm2(root / "teacher"),
        "no-classes": edm2(root / "no-classes", label_dim=0),
        "weaker": edm2(root / "weaker", num_blocks=2),
    }


def noisy(teacher: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    t = torch.tensor([0.1, 1.0, 5.0, 60.0])
    return t.reshape(-1, 1, 1, 1) * torch.randn(4, *teacher.sample_shape), t, torch.tensor([0, 3, 9, 9])


@pytest.mark.parametrize("second", ["no-classes", "weaker"])
def test_it_leads_away_from_the_second_network(second: str, folders: dict[str, Path]) -> None:
    teacher = load_teacher(folders["teacher"])
    guide = open_guide(str(folders[second]), teacher).denoiser
    x_t, t, labels = noisy(teacher)
    with torch.no_grad():
        own = teacher.denoise(x_t, t, labels)
        other = guide.denoise(x_t, t, None if second == "no-classes" else labels)
        guided, features = GuidedDenoiser(teacher, 1.4, guide=guide).denoise(x_t, t, labels, ("mid",))
        expected = teacher.denoise(x_t, t, labels, ("mid",))[1]["mid"]
    assert isinstance(own, Tensor)
    assert isinstance(other, Tensor)
    assert (own - other).abs().max() > 0.01
    torch.testing.assert_close(guided, other + 1.4 * (own - other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features["mid"], expected)


def test_a_network_without_classes_is_guided_too(folders: dict[str, Path]) -> None:
    teacher, guide = load_teacher(folders["no-classes"]), load_teacher(folders["no-classes"])
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x_t, t, _ = noisy(teacher)
        own, other = teacher.denoise(x_t, t), guide.denoise(x_t, t)
        guided = GuidedDenoiser(teacher, 2.0, guide=guide).denoise(x_t, t)
    torch.testing.assert_close(guided, 2 * own - other, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_nothing_of_the_second_network_is_kept(folders: dict[str, Path]) -> None:
    """Unless the output needs a gradient, which then flows through both."""
    teacher = load_teacher(folders["teacher"])
    guided = GuidedDenoiser(teacher, 1.4, guide=load_teacher(folders["no-classes"]))
    x_t, t, labels = noisy(teacher)
    x_t.requires_grad_()

    def kept(denoiser: Denoiser, output_grad: bool) -> int:
        def evaluate() -> Tensor:
            fed = denoiser.network_input(x_t, t)
            prediction, features = denoiser.predict(fed, t, labels, ("mid",), output_grad=output_grad)
            return (prediction.x0(x_t) if output_grad else features["mid"]).square().mean()

        return kept_bytes(denoiser, evaluate)[0]

    assert kept(guided, output_grad=False) <= kept(teacher, output_grad=False)
    assert kept(guided, output_grad=True) > 1.5 * kept(teacher, output_grad=True)
    through = torch.autograd.functional.jacobian(lambda x: guided.denoise(x, t, labels).sum(), x_t.detach())  # type: ignore[union-attr]
    alone = torch.autograd.functional.jacobian(lambda x: teacher.denoise(x, t, labels).sum(), x_t.detach())  # type: ignore[union-attr]
    assert not torch.allclose(through, alone, rtol=1e-2)


def unet(folder: Path, scheduler: Any, **changes: Any) -> Path:
    tiny_unet(**({"in_channels": 3, "out_channels": 3} | changes)).save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def test_what_does_not_fit_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_teacher(folders["teacher"])
    refused = {
        "makes samples": edm2(tmp_path / "size", img_resolution=16),
        "has 7 classes, the teacher 10": edm2(tmp_path / "classes", label_dim=7),
        "predicts something else": edm2(tmp_path / "sigma", sigma_data=1.0),
        "has another noise schedule": unet(tmp_path / "vp", DDPMScheduler(), num_class_embeds=None),
    }
    for message, folder in refused.items():
        with pytest.raises(CheckpointError, match=f"^guidance_teacher .*{message}"):
            open_guide(str(folder), teacher)
    alike = unet(tmp_path / "alike", EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0))
    same = open_guide(str(alike), load_teacher(alike))
    assert same.denoiser.num_classes == 10


def settings(folders: dict[str, Path], second: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "teacher": str(folders["teacher"]),
        "data": "teacher-samples",
        "teacher_samples.count": 16,
        "teacher_samples.num_steps": 2,
        "guidance_scale": 1.4,
        "guidance_teacher": None if second is None else str(folders[second]),
        "discriminator.source": "teacher",
        "batch_size": 4,
        "iterations": 1,
        "log.samples_every": 0,
        **changes,
    }


def test_a_run_is_guided_by_it(folders: dict[str, Path], tmp_path: Path) -> None:
    student = distill("digits", output=tmp_path / "run", **settings(folders, "no-classes"))
    assert f"| guidance_teacher | {folders['no-classes']} |" in (student / "README.md").read_text()
    lines = describe(load_config("digits", settings(folders, "no-classes")))
    assert f"away from the network {folders['no-classes']}" in str(lines)


def test_teacher_samples_of_another_guide_are_others(folders: dict[str, Path]) -> None:
    def made_of(second: str, **changes: Any) -> str:
        samples = data_samples(build(load_config("digits", settings(folders, second, **changes)), torch.device("cpu")))
        assert samples is not None
        return samples.teacher

    named = [made_of("no-classes"), made_of("weaker"), made_of("no-classes", guidance_scale=1.5)]
    assert len(set(named)) == 3
    assert made_of("no-classes") == named[0]


def test_settings_that_do_not_fit_say_what_would(folders: dict[str, Path], tmp_path: Path) -> None:
    for second, changes, message in (
        (None, {}, "null_class set to the teacher's label for it, or a second network as guidance_teacher"),
        ("weaker", {"guidance_scale": 1.0}, "guidance_teacher: got .* guidance_scale is 1"),
        ("weaker", {"negative_prompt": "a"}, "negative_prompt: got 'a', but guidance leads away from guidance_teacher"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill("digits", output=tmp_path / "refused", **settings(folders, second, **changes))


def test_teachers_are_sampled_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    call: dict[str, Any] = {"num_images": 4, "num_steps": 2, "device": "cpu"}
    teacher, weaker = str(folders["teacher"]), str(folders["weaker"])
    manifests = {
        name: json.loads((generate(teacher, output=tmp_path / name, **call, **more) / "manifest.json").read_text())
        for name, more in (("plain", {}), ("guided", {"guidance_scale": 2.0, "guidance_teacher": weaker}))
    }
    assert manifests["guided"]["guidance_teacher"] == weaker
    assert manifests["guided"]["evaluations_per_image"] == 2 * manifests["plain"]["evaluations_per_image"]
    assert manifests["guided"]["checkpoint_sha256"] != manifests["plain"]["checkpoint_sha256"]
    images = [(tmp_path / name / "000001.png").read_bytes() for name in manifests]
    assert images[0] != images[1]
    with pytest.raises(ArgumentError, match=r"^guidance_teacher: applies only with guidance"):
        generate(teacher, output=tmp_path / "refused", guidance_teacher=weaker, **call)

"""Recipes for published teachers: what they say of themselves, and that each one runs with `--smoke`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from fdistill import distill, load_config, load_student, load_teacher
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.adapters.tiny_parts import RESOLUTION
from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.commands import smoke
from fdistill.commands.cli import app
from fdistill.commands.dry_run import describe
from fdistill.commands.smoke import smoke_config
from fdistill.config.reading import dump_config, load_smoke
from fdistill.data.latents import LatentSource
from fdistill.data.prompts import read_prompts
from fdistill.divergence import get_divergence
from fdistill.formats.lora_file import LORA_FILE
from fdistill.guidance import GuidedDenoiser
from fdistill.methods import METHODS
from fdistill.students.text_to_image import check_exportable
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.training.build import build
from support.extras import recipes
from support.published import published_network
from support.thorough import at_night

CONFIGS = Path(__file__).parent.parent.parent / "configs"
#: Recipe -> (shapes of the features it taps, class of its student, pixels of a smoke student's image).
RECIPES: dict[str, tuple[list[tuple[int, int, int]], str, int]] = {
    "cifar10-cond": ([(256, 32, 32), (256, 16, 16), (256, 8, 8)], "OneStepPipeline", 32),
    "cifar10-uncond": ([(256, 32, 32), (256, 16, 16), (256, 8, 8)], "OneStepPipeline", 32),
    "imagenet64": ([(768, 8, 8)], "OneStepPipeline", 64),
    "imagenet512": ([(768, 8, 8)], "OneStepPipeline", 128),
    "imagenet256": ([(1152, 16, 16)], "OneStepPipeline", 64),
    # The hub folder says DDPMPipeline in its model_index.json, and so will its student.
    "ddpm-cifar10": ([(128, 32, 32), (256, 16, 16), (256, 8, 8)], "DDIMPipeline", 32),
}
_SANA_SIZE = {"height": 32, "width": 32}  # the smallest that its pipeline takes
#: Text-to-image recipe -> (pipeline of teacher and student, what that wants beside a size).
TEXT_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("StableDiffusionPipeline", {}),
    "sd15-lora-24gb": ("StableDiffusionPipeline", {}),
    "sd21-v": ("StableDiffusionPipeline", {}),
    "sdxl": ("StableDiffusionXLPipeline", {}),
    "sdxl-lora-24gb": ("StableDiffusionXLPipeline", {}),
    "sd35-medium": ("StableDiffusion3Pipeline", {"sigmas": [1.0, 0.9, 0.75, 0.5]}),
    "sd35-medium-lora-24gb": ("StableDiffusion3Pipeline", {"sigmas": [1.0, 0.9, 0.75, 0.5]}),
    "flux-dev": ("FluxPipeline", {"sigmas": [0.999, 0.74925, 0.4995, 0.24975]}),
    "flux-dev-lora-24gb": ("FluxPipeline", {"sigmas": [0.999, 0.74925, 0.4995, 0.24975]}),
    "flux2-klein-lora-24gb": ("Flux2KleinPipeline", {"sigmas": [1.0, 0.9581, 0.884, 0.7175]}),
    "pixart-sigma": ("PixArtSigmaPipeline", {"use_resolution_binning": False}),
    "z-image": ("ZImagePipeline", {"sigmas": [1.0, 0.9, 0.75, 0.5]}),
    "qwen-image": ("QwenImagePipeline", {"sigmas": [0.999, 0.74925, 0.4995, 0.24975], "true_cfg_scale": 1.0}),
    "sana": ("SanaPipeline", {"sigmas": [1.0, 0.75, 0.5, 0.25], "use_resolution_binning": False, **_SANA_SIZE}),
}
SMOKE_RECIPES = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "\nsmoke:" in path.read_text()]

#: Recipes whose smoke runs are tried by day; those of all are tried at night.
SMOKED = ("cifar10-cond", "sana")


def test_every_recipe_with_a_smoke_section_is_tested_here() -> None:
    assert sorted(SMOKE_RECIPES) == sorted([*RECIPES, *TEXT_RECIPES])


@pytest.mark.parametrize("name", [*RECIPES, *TEXT_RECIPES])
def test_a_recipe_says_what_it_needs_and_reaches(name: str) -> None:
    config, text = load_config(name), (CONFIGS / f"{name}.yaml").read_text()
    head = text[: text.index("\nmethod:")]
    assert all(line.startswith("# ") for line in head.splitlines())
    for heading in ("Reach", "Teacher", "Data", "Hardware", "Hours", "As published", "Ours", "Failures"):
        assert re.search(rf"^# {heading}(?: \([^)]+\))?: \S", head, re.MULTILINE | re.DOTALL), heading
    assert re.search(r"^# Reach: (.|\n)*?arXiv \d{4}\.\d{5}", head, re.MULTILINE)
    assert str(config.teacher) in head
    assert config.method in METHODS
    assert (config.divergence is not None) == (config.method == "f-distill")
    get_divergence(config.divergence or "reverse-kl")
    assert "smoke" not in dump_config(config)


#: Recipe -> the loss with which its teacher was trained, and by default its fake score.
LOSSES = {
    **dict.fromkeys(["cifar10-cond", "cifar10-uncond", "imagenet64", "imagenet512"], "edm"),
    **dict.fromkeys(
        ["imagenet256", "ddpm-cifar10", "sd15", "sd15-lora-24gb", "sdxl", "sdxl-lora-24gb"], "inverse-sigma2"
    ),
    "pixart-sigma": "inverse-sigma2",
    "sd21-v": "v",
    **dict.fromkeys(["sd35-medium", "sd35-medium-lora-24gb", "flux-dev", "flux-dev-lora-24gb"], "flow"),
    **dict.fromkeys(["flux2-klein-lora-24gb", "z-image", "qwen-image", "sana"], "flow"),
}
#: By day, one of each loss.
OF_EACH_LOSS = ("cifar10-cond", "ddpm-cifar10", "sd21-v", "sana")


@pytest.mark.parametrize("name", at_night(recipes([*RECIPES, *TEXT_RECIPES]), lambda name: name not in OF_EACH_LOSS))
def test_the_fake_score_of_a_recipe_learns_as_its_teacher_did(name: str) -> None:
    assert load_config(name).fake_score.weighting is None
    run = build(smoke_config(name), torch.device("cpu"))
    assert run.networks.fake_score.loss_weighting == LOSSES[name]
    update: Any = run.stages[-1].critic_update
    assert update.keywords["weighting"] == LOSSES[name]


def test_the_embedded_configs_compute_what_they_did() -> None:
    for path in CONFIGS.glob("digits*.yaml"):
        config = load_config(path.stem)
        if config.fake_score.weighting is None and METHODS[config.method].scores:
            assert load_teacher(config.teacher).loss_weighting == "edm"  # the default of before
    assert load_config("digits-t2i").fake_score.weighting == "min-snr"


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_network_has_what_the_recipe_names(name: str) -> None:
    shapes, config, denoiser = RECIPES[name][0], load_config(name), published_network(name)
    assert [denoiser.feature_shapes[feature] for feature in config.discriminator.features] == shapes
    assert config.student_levels is not None
    assert denoiser.schedule.t_min < config.student_levels[0] <= denoiser.schedule.t_max
    if config.guidance_scale != 1:
        assert denoiser.null_class is not None
        assert denoiser.guidance_channels == load_teacher(smoke_config(name).teacher).guidance_channels
    # The tiny one is of its family, and tapped at the same places.
    tiny = load_teacher(smoke_config(name).teacher)
    assert type(tiny) is type(denoiser)
    assert type(tiny.network) is type(denoiser.network)
    assert [tiny.feature_shapes[feature][1:] for feature in config.discriminator.features] == [s[1:] for s in shapes]
    assert (tiny.num_classes is None) == (denoiser.num_classes is None)
    x = torch.randn(2, *tiny.sample_shape)
    output = tiny.predict(x, torch.full((2,), 0.5), torch.tensor([0, 1]) if tiny.num_classes else None)[0].output
    assert output.std() > 1e-3  # which only a network without zeroed layers has
    assert load_smoke(name).network["_class_name"] == type(tiny.network).__name__


def test_dit_is_guided_as_published() -> None:
    """By 1.5 on the first three channels: the fourth stays conditional (`forward_with_cfg` of facebookresearch/DiT)."""
    teacher = build(smoke_config("imagenet256"), torch.device("cpu")).networks.teacher
    assert isinstance(teacher, GuidedDenoiser)
    assert teacher.guidance_scale == 1.5
    assert teacher.null_class is not None
    x_t, t = torch.randn(2, *teacher.sample_shape), torch.tensor([200.0, 600.0])
    classes, none = torch.tensor([3, 7]), torch.full((2,), teacher.null_class)
    with torch.no_grad():
        guided, given, free = (
            teacher(x_t, t, classes),
            teacher.denoiser(x_t, t, classes),
            teacher.denoiser(x_t, t, none),
        )
    expected = torch.cat([free[:, :3] + 1.5 * (given - free)[:, :3], given[:, 3:]], dim=1)
    assert (given - free).abs().max() > 1e-3
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", at_night(RECIPES, lambda name: name not in SMOKED))
def test_smoke_run_end_to_end(name: str, tmp_path: Path) -> None:
    _, pipeline_class, pixels = RECIPES[name]
    began = time.process_time()
    recipe, config = load_config(name), smoke_config(name, {"iterations": 1})
    kept = ("method", "divergence", "student_level", "critic_steps", "precision", "guidance_scale", "ratio", "ema")
    assert all(getattr(config, key) == getattr(recipe, key) for key in (*kept, "generator", "discriminator"))

    shown = CliRunner().invoke(app, ["distill", name, "--smoke", "--dry-run", "--output", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert f"teacher        {config.teacher}" in shown.output
    assert not (tmp_path / "run").exists()

    student = distill(config, output=tmp_path / "run")
    pipeline = DiffusionPipeline.from_pretrained(student)
    assert type(pipeline).__name__ == pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    generator = load_student(student)
    if pipeline_class != "OneStepPipeline":
        images = pipeline(batch_size=2, num_inference_steps=1, output_type="np").images
    elif generator.num_classes:
        images = pipeline(class_labels=[0, 1], output_type="np").images
    else:
        images = pipeline(batch_size=2, output_type="np").images
    assert images.shape == (2, pixels, pixels, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0
    before = {key: value for key, value in load_teacher(config.teacher).state_dict().items() if value.numel() > 1}
    assert any(
        not torch.equal(value, before[key]) for key, value in generator.denoiser.state_dict().items() if key in before
    )
    assert time.process_time() - began < 60


def adapted_layers(denoiser: TextDenoiser, targets: list[str] | None) -> set[str]:
    layers = [name for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    return {target for target in targets or [] if any(name.endswith(f".{target}") for name in layers)}


#: By day, UNets and transformers, all weights and adapters.
OF_EACH_NETWORK = ("sd15-lora-24gb", "sd21-v", "sd35-medium-lora-24gb", "sana")


@pytest.mark.parametrize("name", at_night(recipes(TEXT_RECIPES), lambda name: name not in OF_EACH_NETWORK))
def test_published_and_tiny_network_have_what_a_text_recipe_names(name: str) -> None:
    config, tried = load_config(name), smoke_config(name)
    opened = open_teacher(TeacherSettings(tried.teacher, resolution=tried.resolution))
    assert isinstance(opened.denoiser, TextDenoiser)
    real, tiny = published_network(name), opened.denoiser
    assert isinstance(real, TextDenoiser)
    assert (type(tiny), type(tiny.network)) == (type(real), type(real.network))
    assert tiny.kind[0] == real.kind[0]
    levels = torch.linspace(float(real.schedule.t_min), float(real.schedule.t_max), 7)
    torch.testing.assert_close(tiny.schedule.sigma(levels), real.schedule.sigma(levels), rtol=1e-4, atol=1e-6)
    assert opened.checkpoint.index["_class_name"] == TEXT_RECIPES[name][0] == load_smoke(name).pipeline
    assert config.student_levels is not None
    for denoiser in (real, tiny):
        assert denoiser.schedule.t_min < config.student_levels[0] <= denoiser.schedule.t_max
        check_exportable(denoiser, config.student_levels)
        if config.discriminator.gan_weight:
            assert set(config.discriminator.features) <= denoiser.feature_shapes.keys()
        for role in (config.student, config.fake_score):
            assert adapted_layers(denoiser, role.lora_targets) == set(role.lora_targets or [])
    x = torch.randn(2, *tiny.sample_shape)
    output = tiny.predict(x, torch.full((2,), 0.5), tiny.example_condition(2, torch.device("cpu")))[0].output
    assert output.std() > 1e-3


@pytest.mark.parametrize("name", at_night(recipes(TEXT_RECIPES), lambda name: name not in SMOKED))
def test_smoke_run_of_a_text_recipe_end_to_end(name: str, tmp_path: Path) -> None:
    pipeline_class, more = TEXT_RECIPES[name]
    more = {"num_inference_steps": 1, **more} if "sigmas" not in more else more
    began = time.process_time()
    recipe = load_config(name)
    config = smoke_config(name, {} if recipe.stages else {"iterations": 1})
    assert (config.iterations, len(config.stages)) == (2 if recipe.stages else 1, len(recipe.stages))
    same = ("method", "divergence", "student_level", "student", "critic_steps", "precision", "frozen_precision", "ema")
    same += ("guidance_scale", "guidance_rescale", "gradient_checkpointing", "generator", "fake_score", "discriminator")
    assert all(getattr(config, key) == getattr(recipe, key) for key in (*same, "matching_levels", "ratio"))

    shown = CliRunner().invoke(app, ["distill", name, "--smoke", "--dry-run", "--output", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert f"teacher        {config.teacher}" in shown.output
    assert not (tmp_path / "run").exists()

    student = distill(config, output=tmp_path / "run")
    pipeline = DiffusionPipeline.from_pretrained(student)
    assert type(pipeline).__name__ == pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"guidance_scale": 0.0, "height": RESOLUTION, "width": RESOLUTION, **more}
    images = pipeline(
        prompt=["a bold seven", "a thin digit"],
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **asked,
    ).images
    assert images.shape == (2, asked["height"], asked["width"], 3)
    assert np.isfinite(images).all()
    assert images.std() > 0
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    teacher = DiffusionPipeline.from_pretrained(config.teacher)
    before, after = (getattr(one, component).state_dict() for one in (teacher, pipeline))
    changed = [key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key].float())]
    assert any("att" in key for key in changed)
    assert (tmp_path / "run" / "student" / LORA_FILE).is_file() == bool(recipe.student.lora_rank)
    assert time.process_time() - began < 60


def test_what_smoke_makes_of_a_text_recipe_is_what_its_settings_ask_for() -> None:
    first = smoke_config("sd21-v")
    folder = Path(str(first.data))
    latents = LatentSource(folder)
    assert (len(latents), tuple(latents.shape)) == (16, (4, 8, 8))
    assert latents.text is not None
    assert latents.text.rows(torch.arange(2))["prompt_embeds"].dtype == torch.float32
    assert len(set(latents.text.prompts(torch.arange(16)))) == 4
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data", "teacher"]
    # Other encodings are other data; what only training reads is not.
    half = smoke_config("sd21-v", ["frozen_precision=bf16"])
    text = LatentSource(Path(str(half.data))).text
    assert text is not None
    assert text.rows(torch.arange(2))["prompt_embeds"].dtype == torch.bfloat16
    assert smoke_config("sd21-v", {"resolution": 24}).data not in (first.data, half.data)
    assert LatentSource(Path(str(smoke_config("sd21-v", {"resolution": 24}).data))).shape == (4, 12, 12)
    assert smoke_config("sd21-v", {"generator.lr": 1.0}).data == first.data
    for name, data in (("sd15-lora-24gb", "teacher-samples"), ("sdxl-lora-24gb", None)):
        alone = smoke_config(name)
        assert alone.data == data
        assert len(read_prompts(Path(str(alone.prompts)))) == 4


def test_without_the_teacher_there_is_one_sentence_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [*RECIPES, *TEXT_RECIPES]:
        config = load_config(name)
        with pytest.raises(
            CheckpointError, match=f"checkpoint {re.escape(repr(config.teacher))}: no such fol"
        ) as caught:
            describe(config)
        assert "\n" not in str(caught.value)


def test_what_smoke_makes_fits_the_recipe_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = smoke_config("imagenet512")
    folder = Path(first.teacher).parent
    with monkeypatch.context() as patched:
        patched.setattr(smoke, "_write", lambda *_, **__: pytest.fail("made again"))
        assert smoke_config("imagenet512").teacher == first.teacher
    latents = LatentSource(Path(str(first.data)))
    assert (len(latents), latents.num_classes, tuple(latents.shape)) == (16, 10, (4, 64, 64))
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(f"{folder.name}.")] == []
    assert sorted(path.name for path in folder.iterdir()) == ["data", "teacher"]

    own = tmp_path / "own.yaml"
    text = (CONFIGS / "cifar10-cond.yaml").read_text()
    own.write_text(text + "  images: 30\n  overrides: {log: {every: 2}, seed: 5}\n")
    config = smoke_config(str(own))
    assert len(list(Path(str(config.data)).rglob("*.png"))) == 30
    assert (config.log.every, config.log.tracker, config.seed) == (2, "none", 5)
    # What a user says comes last, in either form.
    assert smoke_config(str(own), ["seed=6", "log.every=3"]).log.every == 3
    assert smoke_config(str(own), {"seed": 6, "teacher": "digits"}).teacher == "digits"
    own.write_text(own.read_text() + "images: {recipe: adm}\n")
    changed = smoke_config(str(own))
    assert changed.teacher != config.teacher
    assert Image.open(next(Path(str(changed.data)).rglob("*.png"))).size == (40, 32)
    assert Image.open(next(Path(str(config.data)).rglob("*.png"))).size == (32, 32)


def test_a_wrong_smoke_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'digits': has no smoke section"):
        smoke_config("digits")
    path = tmp_path / "own.yaml"
    wrong = {
        "network: {_class_name: EDMNetwork, model_type: SongUNet, img_resolution: 8, width: 3}": "width",
        "network: {_class_name: EDMnetwork}": "did you mean 'EDMNetwork'",
        "network: {model_type: SongUNet}": "_class_name: got 'None'",
        "netwrk: {}": "netwrk: no such setting; did you mean 'network'",
        "{network: {_class_name: EDMNetwork, model_type: SongUNet, img_resolution: 8}, images: 0}": "images: got 0",
        "{network: {_class_name: UNet2DModel}, scheduler: {_class_name: Nothing}}": "Nothing",
        "pipeline: StableDifusionPipeline": "pipeline: got 'StableDifusionPipeline'; did you mean 'StableDiffusionPip",
        "{pipeline: StableDiffusionPipeline, network: {width: 3}}": "width",
        "{pipeline: StableDiffusionPipeline, vae: {latent_channels: 4}}": "vae: the tiny pipeline has its own",
        "{}": "_class_name: got 'None'",
    }
    for section, message in wrong.items():
        path.write_text(f"smoke:\n  {section}\n")
        with pytest.raises(ConfigError, match=re.escape(message)):
            smoke_config(str(path))
    with pytest.raises(ConfigError, match="no such setting; did you mean 'seed'"):
        load_config("cifar10-cond", ["sed=1"])

"""Runs of text-to-image teachers beyond the plain one: captioned images, adapters resumed, TiUE, CLIP, commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fdistill import distill, load_student, reconstruct_student
from fdistill.adapters.checkpoint import load_teacher, resolve_checkpoint
from fdistill.base.errors import ConfigError, DataError
from fdistill.commands.cli import app
from fdistill.config.reading import load_config
from fdistill.data.latents import LatentSource
from fdistill.data.recipes import RECIPES
from fdistill.formats.lora_file import LORA_FILE
from fdistill.generation.generate import open_maker
from fdistill.guidance import GuidedDenoiser
from fdistill.students.folder import student_folder
from fdistill.students.tiue import TiUEGenerator
from fdistill.teachers.autoencoder import attach_latent_space
from fdistill.teachers.text_encoders import open_prompt_encoder
from fdistill.training import loop
from fdistill.training.build import build
from fdistill.training.cache import cache
from support.clip import tiny_clip_file
from support.text_families import RESOLUTION, flux_dev, sd15, sd21v
from support.text_families_dit import HAS_QWEN_IMAGE, qwen_image
from support.text_runs import LORA, PROMPTS, SETTINGS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15(tmp_path_factory.mktemp("teacher") / "sd15")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned")
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i % len(PROMPTS)], encoding="utf-8")
    return folder


def run(output: Path, teacher: Path, **changes: Any) -> Path:
    return distill("digits", output=output, **{**SETTINGS, "teacher": str(teacher), "iterations": 2, **changes})


def test_captioned_images_are_encoded_once_and_trained_on(captioned: Path, teacher: Path, tmp_path: Path) -> None:
    folder = cache(captioned, teacher=teacher, output=tmp_path / "latents", workers=1, negative_prompt="a house")
    source = LatentSource(folder)
    assert source.text is not None
    assert sorted(source.text.embeddings.prompts) == sorted(PROMPTS)  # each caption once
    said = source.text.prompts(torch.arange(8))
    assert sorted(said) == sorted(2 * PROMPTS)
    settings = {"data": str(folder), "negative_prompt": "a house"}
    student = run(tmp_path / "run", teacher, **settings)
    assert load_student(student).sample_shape == (4, 8, 8)
    with pytest.raises(DataError, match="cached with negative prompt 'a house'"):
        run(tmp_path / "other", teacher, data=str(folder))
    with pytest.raises(DataError, match=r"for another resolution or"):
        run(tmp_path / "other", teacher, **settings, frozen_precision="bf16", precision="bf16")
    (tmp_path / "p.txt").write_text("a cat")
    for data in (captioned, folder):
        with pytest.raises(ConfigError, match="whose captions are the prompts"):
            run(tmp_path / "other", teacher, data=str(data), prompts=str(tmp_path / "p.txt"))
    with pytest.raises(ConfigError, match="whose captions are the prompts"):
        run(tmp_path / "other", teacher, data=str(captioned), prompts=str(tmp_path / "p.txt"))


def test_images_without_captions_are_refused(captioned: Path, teacher: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "0.png").write_bytes((captioned / "0.png").read_bytes())
    with pytest.raises(DataError, match="images without captions"):
        cache(bare, teacher=teacher, output=tmp_path / "latents", workers=1)


def test_a_run_without_images_needs_no_discriminator(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    student = run(tmp_path / "run", teacher, prompts=str(prompts), data=None, method="diff-instruct")
    assert load_student(student).denoiser.text_shapes is not None
    with pytest.raises(ConfigError, match="got null, but method=f-distill shows real images"):
        run(tmp_path / "other", teacher, prompts=str(prompts), data=None)


@pytest.mark.thorough
def test_long_and_short_guidance_and_regression(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    sid: dict[str, Any] = {"prompts": str(prompts), "data": None, "method": "sid"}
    guided: dict[str, float] = {
        "fake_score.guidance_scale": 3.0,
        "fake_score.training_guidance_scale": 4.0,
        "guidance_rescale": 0.7,
    }
    student = run(tmp_path / "sid", teacher, **sid, **guided)
    record = json.loads((tmp_path / "sid" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name for name in record if name.endswith("grad_norm")} == {"generator/grad_norm", "fake_score/grad_norm"}
    assert record["generator/grad_norm"] > 0
    trained, start = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (student, teacher)
    )
    assert any(not torch.equal(trained[name], start[name]) for name in trained)

    def losses(**settings: float) -> list[float]:
        """Of the critic's and the student's first updates."""
        text = load_config("digits", {**SETTINGS, "teacher": str(teacher), **sid, **settings})
        built = build(text, torch.device("cpu"))
        assert built.text is not None
        told, real = built.text.rows(torch.arange(4)), torch.zeros(4, *built.student.sample_shape)
        random = torch.Generator().manual_seed(0)
        critic = built.critic_update(real, told, random).loss
        return [critic.item(), built.student_update(told, random, batch_size=4).loss.item()]

    whole = losses(**guided)
    for name, changed in zip(guided, ([False, True], [True, False], [True, True]), strict=True):
        without = losses(**{other: value for other, value in guided.items() if other != name})
        assert [a != b for a, b in zip(whole, without, strict=True)] == changed, name
    run(tmp_path / "dmd", teacher, prompts=str(prompts), data=None, method="dmd", **{"regression.pairs": 6})
    record = json.loads((tmp_path / "dmd" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["generator/regression"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 1.0, "negative_prompt": "ugly"}, r"negative_prompt: got 'ugly', but guidance is off"),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.5}, r"guidance_rescale: got 0\.5, but guidance is off"),
        ({"frozen_precision": "bf16"}, r"expected precision=bf16 as well"),
        ({"student.lora_rank": 4, "student.network": {"layers_per_block": 1}}, r"student\.lora_rank: got 4"),
        ({"student.noise_kl_weight": 0.1}, r"expected 0, or generator=tiue"),
        ({"generator.gan_gradient_ratio": 1.0, "generator.gan_weight": 0.1}, r"gan_weight: got 0\.1"),
        ({"student.lora_rank": 4, "student.lora_targets": ["to_nothing"]}, r"no layer's name ends in one of them"),
        ({"student.generator": "tiue", "regression.weight": 0.1, "method": "dmd"}, r"regression\.weight"),
    ],
)
def test_settings_that_nothing_reads_are_refused(
    changes: dict[str, Any], message: str, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", teacher, prompts=str(prompts), **changes)


@pytest.mark.thorough
def test_a_resumed_run_of_adapters_is_the_uninterrupted_one(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    settings = {**LORA, "prompts": str(prompts), "log.checkpoint_every": 2}
    whole = run(tmp_path / "whole", teacher, **{**settings, "iterations": 4})
    run(tmp_path / "parts", teacher, **settings)
    parts = run(tmp_path / "parts", teacher, **{**settings, "iterations": 4}, resume=True)
    first, second = (load_file(student / LORA_FILE) for student in (whole, parts))
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The checkpoint has adapters and heads alone: no copy of the base.
    state = next((tmp_path / "whole" / "checkpoints").glob("*/state.safetensors"))
    names = {name for name in load_file(state) if name.startswith(("generator.", "fake_score.", "ema."))}
    assert len(names) > 10
    assert all(".lora_" in name for name in names - {"ema.updates"})


_RELOAD = """
import sys, numpy as np, torch
from fdistill import TiUEPipeline
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline).__name__ == "TiUEPipeline"
latents = torch.from_numpy(np.load(sys.argv[2]))
np.save(sys.argv[3], pipeline(["a cat", "the moon"], latents=latents, output_type="np").images)
"""


@pytest.mark.thorough
def test_tiue_trains_against_a_lora_critic_and_loads_again(prompts: Path, tmp_path: Path) -> None:
    """ "One-Way Ticket": VSD, both scores guided, KL of the predicted noise, four decoders."""
    teacher = sd21v(tmp_path / "sd21v")
    student = run(
        tmp_path / "run",
        teacher,
        prompts=str(prompts),
        data=None,
        method="vsd",
        guidance_scale=4.5,
        student_level=[751, 501, 251, 1],
        **{
            "student.generator": "tiue",
            "student.noise_kl_weight": 0.1,
            "fake_score.guidance_scale": 4.5,
            "fake_score.lora_rank": 4,
            "fake_score.lora_alpha": 6.75,
            "fake_score.lora_targets": ["to_q", "to_v"],
        },
    )
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["generator/noise_kl"] > 0
    generator = load_student(tmp_path / "run")
    assert isinstance(generator, TiUEGenerator)
    assert generator.decoder_levels == (751.0, 501.0, 251.0, 1.0)
    noise = torch.randn(2, *generator.sample_shape, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "noise.npy", noise.numpy())
    arguments = [str(student), str(tmp_path / "noise.npy"), str(tmp_path / "images.npy")]
    subprocess.run([sys.executable, "-c", _RELOAD, *arguments], check=True, cwd=tmp_path)
    source = open_maker(student, torch.device("cpu"))
    assert source.text is not None
    assert source.latents is not None
    with torch.no_grad():
        x0 = generator(noise, source.text.encode(["a cat", "the moon"]))
    own = (source.latents.decode(x0) / 2 + 0.5).clamp(0, 1)
    theirs = torch.from_numpy(np.load(tmp_path / "images.npy")).movedim(-1, 1)
    torch.testing.assert_close(theirs, own, rtol=0, atol=1e-4)


def test_clip_loss_pulls_images_towards_prompts(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    weights = tiny_clip_file(tmp_path)
    settings = {
        "prompts": str(prompts),
        "clip_loss.gradient_ratio": 0.1,
        "clip_loss.model": "tiny-fdistill",
        "clip_loss.margin": 1.0,
    }
    run(tmp_path / "run", teacher, **settings, **{"clip_loss.weights": str(weights)})
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < record["generator/image"] <= 2
    assert record["generator/image_weight"] > 0
    with pytest.raises(ConfigError, match=r"clip_loss.weights is null"):
        run(tmp_path / "other", teacher, **settings)


@pytest.mark.skipif(not HAS_QWEN_IMAGE, reason="this diffusers has no Qwen-Image")
def test_clip_loss_sees_the_images_of_a_video_autoencoder(prompts: Path, tmp_path: Path) -> None:
    """Qwen-Image's autoencoder decodes videos, of which an image is one frame."""
    settings = {
        "prompts": str(prompts),
        "resolution": RESOLUTION,
        "discriminator.features": ["depth50"],
        "clip_loss.weight": 0.1,
        "clip_loss.model": "tiny-fdistill",
        "clip_loss.weights": str(tiny_clip_file(tmp_path)),
        "clip_loss.margin": 1.0,
    }
    run(tmp_path / "run", qwen_image(tmp_path / "qwen"), **settings, iterations=1)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < record["generator/image"] <= 2


def test_commands(captioned: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: object) -> str:
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    command("cache", captioned, "--teacher", teacher, "--output", tmp_path / "latents", "--workers", "1")
    settings = {**SETTINGS, **LORA, "teacher": teacher, "data": tmp_path / "latents", "iterations": 1}
    overrides = [
        f"{key}={json.dumps(value) if not isinstance(value, Path) else value}" for key, value in settings.items()
    ]
    command("distill", "digits", *overrides, "--output", tmp_path / "run")
    command("generate", tmp_path / "run", "--num-images", 2, "--prompt", "a cat", "--output", tmp_path / "images")
    assert json.loads((tmp_path / "images" / "manifest.json").read_text())["prompts"] == ["a cat", "a cat"]
    command("export", tmp_path / "run", "--format", "lora", "--output", tmp_path / "lora.safetensors")
    assert (
        load_file(tmp_path / "lora.safetensors").keys()
        == load_file(student_folder(tmp_path / "run") / LORA_FILE).keys()
    )
    said = command(
        "export", tmp_path / "run", "--format", "comfy", "--dtype", "fp16", "--output", tmp_path / "comfy.safetensors"
    )
    assert "ComfyUI" in said  # a UNet of this size is none that it knows
    names = load_file(tmp_path / "comfy.safetensors")
    assert any(name.startswith("model.diffusion_model.input_blocks.") for name in names)
    base = ["--base", teacher, "--output", tmp_path / "converted"]
    command("convert", tmp_path / "comfy.safetensors", *base)
    assert load_teacher(tmp_path / "converted").sample_shape == (4, 8, 8)


def test_dry_run_of_a_text_run(
    teacher: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, **LORA, "teacher": teacher, "prompts": prompts}
    overrides = [
        f"{key}={json.dumps(value) if not isinstance(value, Path) else value}" for key, value in settings.items()
    ]
    app(["distill", "digits", *overrides, "--output", str(tmp_path / "run"), "--dry-run"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "4 prompts" in said
    assert "adapters of rank 4" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not HAS_QWEN_IMAGE, reason="this diffusers has no Qwen-Image")
def test_rescaled_guidance_of_qwen_image_is_its_pipelines(tmp_path: Path) -> None:
    """comb * |cond| / |comb| for each token, as QwenImagePipeline does it after true CFG."""
    from einops import rearrange

    denoiser = load_teacher(qwen_image(tmp_path / "qwen"))
    denoiser.resize(RESOLUTION // 2, RESOLUTION // 2)  # type: ignore[operator]
    torch.manual_seed(0)
    conditional, guided = torch.randn(2, 2, *denoiser.sample_shape)

    def tokens(value: torch.Tensor) -> torch.Tensor:
        return rearrange(value, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    expected = tokens(guided) * (
        tokens(conditional).norm(dim=-1, keepdim=True) / tokens(guided).norm(dim=-1, keepdim=True)
    )
    rescaled = guided * denoiser.guidance_norm(conditional) / denoiser.guidance_norm(guided)
    torch.testing.assert_close(tokens(rescaled), expected)


def test_a_config_reaches_the_networks(teacher: Path, prompts: Path) -> None:
    settings = {
        **SETTINGS,
        **LORA,
        "teacher": str(teacher),
        "prompts": str(prompts),
        "guidance_rescale": 0.3,
        "precision": "bf16",
        "frozen_precision": "bf16",
        "fake_score.guidance_scale": 1.5,
        "fake_score.training_guidance_scale": 2.5,
        "generator.gan_gradient_ratio": 0.7,
    }
    built = build(load_config("digits", settings), torch.device("cpu"))
    networks = built.networks
    assert isinstance(networks.teacher, GuidedDenoiser)
    assert isinstance(networks.compared, GuidedDenoiser)
    assert isinstance(networks.learning, GuidedDenoiser)
    scales = [network.guidance_scale for network in (networks.teacher, networks.compared, networks.learning)]
    assert scales == [2.0, 1.5, 2.5]
    assert networks.teacher.rescale == networks.compared.rescale == 0.3
    assert built.student_update.keywords["gan_gradient_ratio"] == 0.7  # type: ignore[attr-defined]
    assert {p.dtype for p in networks.teacher.parameters()} == {torch.bfloat16}
    trained = [p for role in built.optimizers for p in built.role(role).parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    scaling = {
        name: {s for module in role.modules() for s in getattr(module, "scaling", {}).values()}
        for name, role in (("student", built.student), ("fake", networks.fake_score))
    }
    assert scaling == {"student": {1.0}, "fake": {2.0}}  # alpha 8 for rank 4


def test_flux_is_told_the_scale_wherever_its_student_starts(prompts: Path, tmp_path: Path) -> None:
    folder = flux_dev(tmp_path / "flux")
    settings = {
        **SETTINGS,
        "teacher": str(folder),
        "prompts": str(prompts),
        "resolution": RESOLUTION,
        "discriminator.features": ["depth50"],
        "student.checkpoint": str(folder),
    }
    built = build(load_config("digits", settings), torch.device("cpu"))
    denoisers = (built.networks.teacher, built.networks.fake_score, built.student.denoiser)
    assert [denoiser.embedded_guidance for denoiser in denoisers] == [2.0, 2.0, 2.0]
    with pytest.raises(ConfigError, match="this network takes guidance_scale as an input"):
        build(load_config("digits", {**settings, "fake_score.guidance_scale": 2.0}), torch.device("cpu"))


def test_the_critic_is_told_the_null_prompt_now_and_then(
    teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[bool]] = []
    made = loop.build

    def watched(*arguments: Any) -> Any:
        built = made(*arguments)
        update, none = built.critic_update, built.none["prompt_embeds"]

        def critic_update(*inputs: Any, **options: Any) -> Any:
            rows = options["critic_condition"]["prompt_embeds"]
            told.append([torch.equal(row, none[0]) for row in rows])
            assert all(
                torch.equal(a, b) or dropped
                for a, b, dropped in zip(rows, options["condition"]["prompt_embeds"], told[-1], strict=True)
            )
            return update(*inputs, **options)

        built.stages[0].critic_update = critic_update
        return built

    monkeypatch.setattr(loop, "build", watched)
    run(tmp_path / "run", teacher, prompts=str(prompts), condition_dropout=0.5, batch_size=8, iterations=4)
    assert 8 <= sum(sum(rows) for rows in told) <= 24
    assert len({tuple(rows) for rows in told}) > 1


def test_what_encoders_make_of_prompts(teacher: Path, captioned: Path, tmp_path: Path) -> None:
    encoders = open_prompt_encoder(resolve_checkpoint(teacher), 16)
    assert not torch.equal(encoders.null("a house")["prompt_embeds"], encoders.null("")["prompt_embeds"])
    torch.testing.assert_close(encoders.null("")["prompt_embeds"], encoders.encode([""])["prompt_embeds"])
    long = " ".join(["a dog"] * 60 + ["an old house"])
    (cut,) = encoders.cut(["a cat", long])
    assert (cut.index, cut.tokenizer) == (1, "tokenizer")
    assert cut.dropped.endswith("an old house")
    # What is kept is what the encoder sees, but for the last token, which may be cut within a word.
    whole, kept = (encoders.encode([text])["prompt_embeds"] for text in (long, long.removesuffix(cut.dropped)))
    torch.testing.assert_close(whole[:, : cut.limit - 2], kept[:, : cut.limit - 2])
    assert len(encoders.cut([long.removesuffix(cut.dropped)])) == 0
    # Every cached image has the embedding of its own caption.
    folder = cache(captioned, teacher=teacher, output=tmp_path / "latents", workers=1, sampling="mean")
    source = LatentSource(folder)
    assert source.text is not None
    expected = {
        (captioned / f"{i}.txt").read_text(): encoders.encode([(captioned / f"{i}.txt").read_text()])["prompt_embeds"][
            0
        ]
        for i in range(8)
    }
    latents = attach_latent_space(load_teacher(teacher), resolve_checkpoint(teacher), None)
    assert latents is not None
    by_image = {}
    for i in range(8):
        image = Image.open(captioned / f"{i}.png")
        pixels = RECIPES["center-box"](image, 16, 16)
        x = torch.from_numpy(np.asarray(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1
        by_image[i] = latents.moments(x)[0]
    for row in range(8):
        mean, std = source.moments(torch.tensor([row]))
        own = torch.cat([mean, std], dim=1)[0]
        image = min(by_image, key=lambda i: (by_image[i] - own).abs().max().item())
        caption = (captioned / f"{image}.txt").read_text()
        assert source.text.prompts(torch.tensor([row])) == [caption]
        torch.testing.assert_close(
            source.text.rows(torch.tensor([row]))["prompt_embeds"][0], expected[caption], rtol=1e-3, atol=1e-4
        )


def test_few_steps_are_the_pipelines(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    """A student of two steps, against its pipeline with the noise between them from the same generator."""
    from diffusers import DiffusionPipeline

    student = run(tmp_path / "run", teacher, prompts=str(prompts), student_level=[749, 249])
    generator = load_student(student)
    call = json.loads((student / "fdistill_student.json").read_text())["call"]
    assert call["timesteps"] == [749, 249]
    noise = torch.randn(2, 2, *generator.sample_shape, generator=torch.Generator().manual_seed(0))
    pipeline = DiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(5)
    between = torch.randn(2, *generator.sample_shape, generator=random)
    noise[:, 1] = between
    images = pipeline(
        ["a cat", "the moon"],
        latents=noise[:, 0].clone(),
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **call,
    ).images
    source = open_maker(student, torch.device("cpu"))
    assert source.text is not None
    assert source.latents is not None
    with torch.no_grad():
        x0 = generator(noise, source.text.encode(["a cat", "the moon"]))
    torch.testing.assert_close(images, (source.latents.decode(x0) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("generator", ["denoiser", "tiue"])
def test_another_average_of_a_text_student(teacher: Path, prompts: Path, tmp_path: Path, generator: str) -> None:
    averages = {"ema.sigma_rel": [0.05, 0.1], "ema.decays": [0.98], "ema.export": 0.98}
    settings = {**averages, "ema.snapshot_every": 1, "student.generator": generator}
    student = run(tmp_path / "run", teacher, prompts=str(prompts), **settings)
    other = reconstruct_student(tmp_path / "run", sigma_rel=0.1, output=tmp_path / "other")
    assert PROMPTS[0] in (student / "README.md").read_text()
    first, second = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (student, other))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert type(load_student(other)) is type(load_student(student))

"""Text-to-image teachers of every family: two iterations, full and with adapters; export; the same image in plain
diffusers, in a process that never imports fdistill.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdistill import distill, generate, load_student
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError
from fdistill.formats.lora_file import LORA_FILE
from fdistill.students.lora import has_adapters
from fdistill.training import loop
from support.drawn import Drawn
from support.text_families import RESOLUTION, TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_runs import LORA, PROMPTS, SETTINGS

FAMILIES = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}


#: At the last timestep an eps-prediction becomes x0 with 15 times its rounding error (with PixArt's betas 158 times),
#: of which these networks, untrained, have too much for 1e-4.
LEVELS = {"sdxl": 399.0, "pixart": 399.0, "pixart-alpha": 399.0}


MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}


def features(name: str) -> list[str]:
    return ["mid"] if name.startswith("sd") and name not in ("sd3", "sd35-large") else ["depth50", "depth75", "depth99"]


def resolution(name: str) -> int:
    size: int = FAMILIES[name][2].get("height", RESOLUTION)
    return size


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: write(folder / name) for name, (write, _, _) in FAMILIES.items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


_DRAW = """
import json, sys, numpy as np, torch
from diffusers import DiffusionPipeline
jobs = json.load(open(sys.argv[1]))
for job in jobs:
    pipeline = DiffusionPipeline.from_pretrained(job["student"])
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == job["pipeline"], type(pipeline)
    latents = torch.from_numpy(np.load(job["latents"]))
    images = pipeline(prompt=job["prompts"], latents=latents, output_type="np", **job["call"]).images
    np.save(job["images"], images)
assert "fdistill" not in sys.modules
"""


def pipeline_latents(name: str, noise: Tensor) -> Tensor:
    """Noise as the family's pipeline wants it."""
    if name.startswith("flux-") or name == "qwen-image":
        packed: Tensor = rearrange(noise, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        return packed
    return noise


@pytest.mark.thorough  # by day, test_text_runs.py and tests/students train and export
@pytest.mark.parametrize("name", FAMILIES)
def test_two_iterations_export_and_the_same_image_in_plain_diffusers(
    name: str, teachers: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    jobs, expected = [], {}
    for mode, changes in MODES.items():
        output = tmp_path / mode
        with pytest.MonkeyPatch.context() as patch:
            drawn = Drawn()
            drawn.record(patch)
            student = distill(
                "digits",
                output=output,
                teacher=str(teachers[name]),
                prompts=str(prompts),
                resolution=resolution(name),
                **{
                    **SETTINGS,
                    **changes,
                    "iterations": 2,
                    "discriminator.features": features(name),
                    "student_level": LEVELS.get(name),
                },
            )
        facts = json.loads((student / "fdistill_student.json").read_text())
        assert facts["pipeline"] == FAMILIES[name][1]
        base = drawn.weights["teacher"]
        shared = [base & drawn.weights[role] for role in ("fake", "student")]
        assert shared == ([base, base] if mode == "lora" else [set(), set()])
        assert (student / LORA_FILE).is_file() == (mode == "lora")
        latents = tmp_path / f"{mode}.npy"
        # One of each prompt, as they were encoded: encoders round differently in batches of another size, by 1e-5,
        # of which these networks, untrained, make more than 1e-4.
        rows = [drawn.prompts.index(prompt) for prompt in PROMPTS]
        np.save(latents, pipeline_latents(name, drawn.noise[rows]).numpy())
        images = tmp_path / f"{mode}-images.npy"
        expected[mode] = (drawn.images[rows], images)
        jobs.append(
            {
                "student": str(student),
                "pipeline": FAMILIES[name][1],
                "prompts": PROMPTS,
                "latents": str(latents),
                "images": str(images),
                "call": facts["call"],
            }
        )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-c", _DRAW, str(tmp_path / "jobs.json")], check=True, cwd=tmp_path)
    for mode, (own, path) in expected.items():
        theirs = torch.from_numpy(np.load(path)).movedim(-1, 1)
        assert own.std() > 0.01, mode
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-4, msg=lambda m, mode=mode: f"{mode}: {m}")


@pytest.fixture(scope="module")
def lora_student(teachers: dict[str, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "run"
    return distill("digits", output=output, teacher=str(teachers["sd15"]), prompts=str(prompts), **{**SETTINGS, **LORA})


@pytest.mark.thorough  # by day, tests/students/test_fast_lora.py
def test_the_lora_file_beside_the_student_turns_the_teacher_into_it(
    lora_student: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(teachers["sd15"])
    pipeline.load_lora_weights(lora_student, weight_name=LORA_FILE)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = load_file(lora_student / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(teachers["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")
    changed = 0
    for key, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)
        changed += int(not torch.equal(merged[key], before[key]))
    assert changed == sum(
        key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")) for key in before
    )


def test_adapters_learn_apart(
    teachers: dict[str, Path], prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each update reaches the adapters of its own role; the base and the other adapters have no gradient."""
    seen: dict[str, set[str]] = {}
    update = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        run = runs[0]
        everything = {
            **{f"student {n}": p for n, p in run.student.named_parameters()},
            **{f"fake {n}": p for n, p in run.networks.fake_score.named_parameters()},
            **{f"teacher {n}": p for n, p in run.networks.teacher.named_parameters()},
        }
        role = next(name for name, own in run.optimizers.items() if own is optimizer)
        seen.setdefault(role, set()).update(n for n, p in everything.items() if p.grad is not None)
        return update(optimizer, *arguments, **options)

    runs: list[Any] = []
    build = loop.build
    monkeypatch.setattr(loop, "build", lambda *a: runs.append(build(*a)) or runs[0])
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    distill(
        "digits",
        output=tmp_path / "run",
        teacher=str(teachers["sd15"]),
        prompts=str(prompts),
        **{**SETTINGS, **LORA, "iterations": 2},
    )
    assert seen["generator"]
    assert all(name.startswith("student ") and ".lora_" in name and ".student." in name for name in seen["generator"])
    # The discriminator's optimiser steps after the fake score's has; its own heads are none of these networks.
    assert seen["fake_score"]
    assert all(name.startswith("fake ") and ".lora_" in name and ".fake." in name for name in seen["fake_score"])
    ema = {name for shadow in runs[0].ema.shadows.values() for name in shadow}
    assert ema
    assert all(".lora_" in name for name in ema)  # no copy of the base


def test_no_text_encoder_and_no_autoencoder_in_a_step(
    teachers: dict[str, Path], prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once prompts are in the cache, a run does not even load text encoders; a step calls no autoencoder."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    from fdistill.step import critic, matching

    settings = {**SETTINGS, "teacher": str(teachers["sd15"]), "prompts": str(prompts), "iterations": 2}
    distill("digits", output=tmp_path / "first", **settings)
    inside: list[bool] = []

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", forbidden)
    monkeypatch.setattr(CLIPTextModel, "forward", forbidden)
    decode = AutoencoderKL.decode

    def decoded(*arguments: Any, **options: Any) -> Any:
        assert not inside, "an autoencoder in a step"
        return decode(*arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", decoded)
    for module, name in ((critic, "critic_step"), (matching, "generator_step")):
        own = getattr(module, name)

        @functools.wraps(own)  # a run gives a step what its signature names
        def watched(*arguments: Any, own: Any = own, **options: Any) -> Any:
            inside.append(True)
            try:
                return own(*arguments, **options)
            finally:
                inside.clear()

        monkeypatch.setattr(module, name, watched)
    distill("digits", output=tmp_path / "second", **settings)
    first, second = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("first", "second")
    )
    assert first["generator/matching"] == second["generator/matching"]


def test_generate_draws_prompts_whatever_the_batch_size(lora_student: Path, tmp_path: Path) -> None:
    for name, batch_size in (("one", 1), ("three", 3)):
        generate(lora_student, num_images=5, output=tmp_path / name, prompts=PROMPTS, batch_size=batch_size)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["prompts"] == [*PROMPTS, PROMPTS[0]]
    assert manifest["evaluations_per_image"] == 1
    from PIL import Image

    for i in range(5):
        one, three = (np.asarray(Image.open(tmp_path / name / f"{i:06d}.png"), dtype=int) for name in ("one", "three"))
        assert np.abs(one - three).max() <= 1


def test_a_guided_teacher_draws_prompts(teachers: dict[str, Path], tmp_path: Path) -> None:
    folder = generate(
        teachers["sd21v"],
        num_images=2,
        output=tmp_path / "images",
        prompts=["a cat"],
        num_steps=2,
        guidance_scale=3.0,
        negative_prompt="the moon",
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["evaluations_per_image"] == 6
    assert manifest["negative_prompt"] == "the moon"


class TestBadInput:
    def settings(self, teachers: dict[str, Path], **changes: Any) -> dict[str, Any]:
        return {**SETTINGS, "teacher": str(teachers["sd15"]), **changes}

    def test_a_pipeline_of_another_class(self, teachers: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
        import shutil

        other = tmp_path / "other"
        shutil.copytree(teachers["sd15"], other)
        index = json.loads((other / "model_index.json").read_text())
        (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
        with pytest.raises(CheckpointError, match=r"'KandinskyPipeline' is not supported.*StableDiffusionXLPipeline"):
            distill(
                "digits",
                output=tmp_path / "run",
                **{**self.settings(teachers), "teacher": str(other), "prompts": str(prompts)},
            )

    def test_no_prompts(self, teachers: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="prompts: got null"):
            distill("digits", output=tmp_path / "run", **self.settings(teachers))

    def test_prompts_for_a_teacher_that_takes_none(self, prompts: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="takes no prompts"):
            distill("digits", output=tmp_path / "run", prompts=str(prompts))

    def test_images_that_are_not_cached(self, teachers: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="fdistill cache"):
            distill("digits", output=tmp_path / "run", **self.settings(teachers, data=str(tmp_path)))

    def test_a_student_level_that_no_scheduler_has(
        self, teachers: dict[str, Path], prompts: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="whole timesteps"):
            distill(
                "digits", output=tmp_path / "run", **self.settings(teachers, prompts=str(prompts), student_level=2.5)
            )

    def test_a_resolution_that_is_no_multiple(self, teachers: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="resolution: got 17; expected a multiple"):
            distill("digits", output=tmp_path / "run", **self.settings(teachers, prompts=str(prompts), resolution=17))

    def test_a_class_conditional_student_is_told_no_prompts(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="takes none"):
            generate("digits", num_images=1, output=tmp_path / "images", prompts=["a cat"])

    def test_a_lora_of_another_base(self, teachers: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
        layer = "unet.down_blocks.0.attentions.7.to_q"
        save_file(
            {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)},
            tmp_path / "x.safetensors",
        )
        with pytest.raises(CheckpointError, match="another base"):
            distill(
                "digits",
                output=tmp_path / "run",
                **self.settings(teachers, prompts=str(prompts), teacher_lora=str(tmp_path / "x.safetensors")),
            )

    def test_long_prompts_are_counted_and_what_is_cut_is_said(
        self, teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "long.txt"
        path.write_text("a cat\n" + "a dog " * 60 + "and a house\n")
        distill("digits", output=tmp_path / "run", **self.settings(teachers, prompts=str(path), iterations=1))
        said = capsys.readouterr()
        assert "1 of 2 prompts are longer than the" in said.out + said.err
        assert "house" in said.out + said.err


def test_flux_students_are_told_no_guidance(teachers: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "teacher": str(teachers["flux-dev"]), "prompts": str(prompts), "resolution": RESOLUTION}
    student = distill(
        "digits", output=tmp_path / "run", **{**settings, "iterations": 1, "discriminator.features": ["depth50"]}
    )
    assert not FluxTransformer2DModel.load_config(student / "transformer")["guidance_embeds"]
    assert not has_adapters(load_student(student).denoiser)

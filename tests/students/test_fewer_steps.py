"""A student that has learnt to take fewer steps takes them in other programs, called as its card and `export` say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fdistill.adapters.checkpoint import Checkpoint
from fdistill.generator import student_generator
from fdistill.student_kinds import STUDENT_FILE, Sampler
from fdistill.students.fewer_steps import fewer_steps
from fdistill.students.folder import load_student, save_student, student_facts
from fdistill.teachers.autoencoder import attach_latent_space
from support.text_families import TEXT_FAMILIES
from support.text_pipelines import condition_of, denoiser_of, load_pipeline
from support.thorough import at_night

PROMPTS = ["a bold handwritten seven", "a thin digit"]
LEVELS = {"sd15": [999.0, 749.0, 499.0, 249.0], "sd3": [1.0, 0.9, 0.75, 0.5]}
CASES: list[tuple[str, Sampler]] = [
    ("sd15", "stochastic"),
    ("sd3", "deterministic"),
    ("sd15", "deterministic"),
    ("sd3", "stochastic"),
]


def saved(name: str, sampler: Sampler, folder: Path, **card: Any) -> Path:
    """A four-step student of a tiny pipeline, with the weights of its teacher."""
    origin = Checkpoint(name, TEXT_FAMILIES[name][0](folder / name))
    assert origin.folder is not None
    denoiser = denoiser_of(load_pipeline(origin.folder))
    latents = attach_latent_space(denoiser, origin, None)
    student = student_generator(denoiser, LEVELS[name], sampler)
    made = folder / "student"
    save_student(
        student, made, origin=origin, latents=latents, card={"teacher": name, **card}, config=None, samples=None
    )
    return made


@pytest.mark.parametrize(("name", "sampler"), at_night(CASES, lambda case: CASES.index(case) > 1))
def test_the_pipeline_called_so_is_the_student_of_fewer_steps(name: str, sampler: Sampler, tmp_path: Path) -> None:
    folder = saved(name, sampler, tmp_path, any_step=True)
    facts = student_facts(folder)
    found = fewer_steps(facts)
    assert list(found) == [3, 2, 1]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "tags: [few-step, " in card
    for steps, changed in found.items():
        pipeline = load_pipeline(folder)
        # The pipelines of flow models give their scheduler no generator.
        draws: dict[str, Any] = {} if name == "sd3" else {"generator": torch.Generator().manual_seed(4)}
        torch.manual_seed(4)
        call = {**facts["call"], **changed}
        got = pipeline(prompt=PROMPTS, **call, **draws, output_type="latent").images
        student = load_student(folder, steps=steps)
        noise = torch.randn(steps, *got.shape, generator=torch.Generator().manual_seed(4)).transpose(0, 1)
        condition = condition_of(load_pipeline(folder), PROMPTS, call["height"])
        with torch.no_grad():
            expected = student(noise[:, 0] if steps == 1 or sampler == "deterministic" else noise, condition)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        (argument,) = changed
        assert f"{argument}={changed[argument]} for {steps} step" in card


def test_others_say_nothing(tmp_path: Path) -> None:
    folder = saved("sd3", "stochastic", tmp_path)
    assert fewer_steps(student_facts(folder)) == {}
    assert "fewer steps" not in (folder / "README.md").read_text(encoding="utf-8")
    facts = json.loads((folder / STUDENT_FILE).read_text(encoding="utf-8"))
    assert fewer_steps({**facts, "any_step": True, "call": {}}) == {}

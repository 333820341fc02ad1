"""A LoRA student in diffusers: base pipeline, exported file, exported scheduler and printed call draw its images."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_flow_match_lcm, scheduling_lcm
from torch import Tensor

from fdistill import distill
from fdistill.student_kinds import Sampler
from fdistill.students.export import export_student
from support.drawn import Drawn
from support.text_families import TEXT_FAMILIES
from support.text_pipelines import load_pipeline
from support.text_runs import LORA, PROMPTS, SETTINGS
from support.thorough import at_night

LEVELS = {"sd15": [999.0, 749.0, 499.0, 249.0], "sd3": [1.0, 0.9, 0.75, 0.5]}
CASES: list[tuple[str, Sampler, str]] = [
    ("sd15", "stochastic", "LCMScheduler"),
    ("sd3", "deterministic", "FlowMatchEulerDiscreteScheduler"),
    ("sd3", "stochastic", "FlowMatchLCMScheduler"),
]


def printed(note: str) -> tuple[Any, dict[str, Any]]:
    """The scheduler and the arguments of a call that `fdistill export` prints."""
    found = re.fullmatch(r"sample with (\w+), whose config is in (.+), and call the pipeline with (.+)", note)
    assert found
    call: Any = ast.parse(f"call({found[3]})", mode="eval").body
    arguments = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    return getattr(diffusers, found[1]).from_pretrained(found[2]), arguments


@pytest.mark.parametrize(("name", "sampler", "scheduler"), at_night(CASES, lambda case: case is CASES[-1]))
def test_the_base_with_the_exported_lora_draws_the_trainers_four_step_images(
    name: str, sampler: Sampler, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, prompts, drawn = TEXT_FAMILIES[name][0](tmp_path / name), tmp_path / "prompts.txt", Drawn()
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    drawn.record(monkeypatch)
    changes: dict[str, Any] = {"iterations": 2, "student_level": LEVELS[name], "student.sampler": sampler}
    changes |= {
        "discriminator.features": ["mid" if name == "sd15" else "depth50"],
        "generator.lr": 0.1,
        "student.lora_alpha": 8.0,
    }
    run: dict[str, Any] = SETTINGS | LORA | changes
    student = distill("digits", output=tmp_path / "run", teacher=str(teacher), prompts=str(prompts), **run)
    (note,) = export_student(student, "lora", tmp_path / "four.safetensors")

    pipeline = load_pipeline(teacher)
    pipeline.scheduler, call = printed(note)
    assert type(pipeline.scheduler).__name__ == scheduler
    assert call["guidance_scale"] == 0
    # One of each prompt, as they were encoded: encoders round differently in batches of another size.
    rows = [drawn.prompts.index(prompt) for prompt in PROMPTS]
    noise, expected = drawn.noise[rows], drawn.images[rows]
    first, *later = noise.unbind(1) if sampler == "stochastic" else (noise,)

    def draw() -> Tensor:
        between = iter([*later, torch.zeros_like(first)])  # after the last step there is no noise, though one draws it
        for module in (scheduling_lcm, scheduling_flow_match_lcm):
            monkeypatch.setattr(module, "randn_tensor", lambda *_args, **_settings: next(between))
        images: Tensor = pipeline(prompt=PROMPTS, latents=first, output_type="pt", **call).images
        assert len(list(between)) <= 1
        return images

    assert (draw() - expected).abs().max() > 1e-2
    pipeline.load_lora_weights(tmp_path, weight_name="four.safetensors")
    torch.testing.assert_close(draw(), expected, rtol=0, atol=1e-4)

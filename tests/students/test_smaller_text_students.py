"""Smaller students of text-to-image teachers of every family: what is copied, a short run, export, plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fdistill import distill, load_student, load_teacher
from fdistill.adapters.resize import resized
from fdistill.base.errors import ConfigError
from support.text_families import TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_runs import PROMPTS, SETTINGS
from support.thorough import at_night

FAMILIES = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}
TWO_BLOCKS: dict[str, Any] = {"num_layers": 2}
#: What makes each network smaller; by default, fewer blocks.
SMALLER: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [8, 12]},
    "sd21v": {"block_out_channels": [8, 12]},
    "sdxl": {"transformer_layers_per_block": [1, 1]},
    "flux-dev": {"num_layers": 1, "num_single_layers": 1},
    "flux-schnell": {"num_layers": 1, "num_single_layers": 0},
    "z-image": {"n_layers": 2},
    "flux2-klein": {"num_layers": 1, "num_single_layers": 1},
    "flux2-dev": {"num_layers": 1},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: write(folder / name) for name, (write, _, _) in FAMILIES.items()}


@pytest.mark.parametrize("name", at_night(FAMILIES, lambda name: name != "flux-dev"))
def test_a_smaller_student_is_trained_and_exported(name: str, teachers: dict[str, Path], tmp_path: Path) -> None:
    changes = SMALLER.get(name, TWO_BLOCKS)
    teacher: Any = load_teacher(teachers[name])
    smaller: Any = resized(teacher, changes).denoiser
    counts = [sum(p.numel() for p in denoiser.parameters()) for denoiser in (smaller, teacher)]
    assert counts[0] < counts[1]

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    call = FAMILIES[name][2]
    settings = {
        **SETTINGS,
        "teacher": str(teachers[name]),
        "prompts": str(tmp_path / "prompts.txt"),
        "method": "diff-instruct",
        "data": None,
        "condition_dropout": 0,
        "iterations": 2,
        "student.network": changes,
        "resolution": call.get("height"),
    }
    student = distill("digits", output=tmp_path / "run", **settings)
    listed = json.loads((tmp_path / "run" / "student_weights.json").read_text())
    assert sorted(listed["copied"] + listed["new"]) == sorted(smaller.network.state_dict())
    assert listed["copied"]

    generator: Any = load_student(student)
    assert generator.denoiser.network.config[next(iter(changes))] == next(iter(changes.values()))
    if name == "flux2-dev":  # whose student is called with the scale that it was trained with
        told = json.loads((student / "fdistill_student.json").read_text())["call"]["guidance_scale"]
        assert told == generator.denoiser.embedded_guidance == SETTINGS["guidance_scale"]
    start, trained = smaller.network.state_dict(), generator.denoiser.network.state_dict()
    # Into FLUX.1-dev's other weights.
    folded = {key for key in start if ".guidance_embedder." in key and name == "flux-dev"}
    assert trained.keys() == start.keys() - folded
    assert any(not torch.equal(trained[key], start[key]) for key in listed["copied"] if key not in folded)

    pipeline: Any = DiffusionPipeline.from_pretrained(student)
    assert type(pipeline).__name__ == FAMILIES[name][1]
    assert pipeline.config.get("is_distilled", True)  # klein's, which then ignores its default guidance scale
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt=PROMPTS[0], **json.loads((student / "fdistill_student.json").read_text())["call"]).images[0]
    assert image.size == (call.get("height", 16),) * 2


@pytest.mark.parametrize(
    ("name", "change"), [("sd15", {"cross_attention_dim": 12}), ("sd3", {"joint_attention_dim": 12})]
)
def test_a_student_that_other_prompts_are_for_is_refused(
    name: str, change: dict[str, Any], teachers: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"student\.network: takes prompts as .* one text encoder serves both"):
        resized(load_teacher(teachers[name]), change)

"""What `export` says of sampling, against the sigmas of diffusers' own schedulers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file

from fdistill.adapters.parametrisation import DirectPrediction, student_scheduler
from fdistill.formats.lora_file import LORA_FILE
from fdistill.noise import FlowSchedule, vp_schedule_from_config
from fdistill.student_kinds import STUDENT_FILE, Sampler
from fdistill.students.export import _how_to_sample, export_student

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = DirectPrediction(vp_schedule_from_config({**DDPMScheduler(**SD).config, "_class_name": "DDPMScheduler"}), "eps")
FLOW = DirectPrediction(FlowSchedule(), "flow", 1000.0)


def student(folder: Path, form: DirectPrediction, levels: list[float], sampler: Sampler) -> Path:
    """A folder with what `export` reads: adapters of one layer, the scheduler, and the student's file."""
    folder.mkdir()
    prefix = "transformer.blocks.0.proj" if form is FLOW else "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{prefix}.lora_{matrix}.weight": torch.ones(2, 2) for matrix in "AB"}
    save_file(tensors, folder / LORA_FILE)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    found = student_scheduler(form, levels, sampler)
    assert found is not None
    scheduler, call = found
    scheduler.save_pretrained(folder / "scheduler")
    facts = {"levels": levels, "sampler": sampler, "call": {**call, "guidance_scale": 0.0}}
    (folder / STUDENT_FILE).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_a_flows_sigmas_are_its_levels(tmp_path: Path, sampler: Sampler) -> None:
    folder = student(tmp_path / "student", FLOW, [1.0, 0.9, 0.75, 0.5], sampler)
    (told,) = export_student(folder, "comfy-lora", tmp_path / "lora.safetensors")
    name = {"stochastic": "lcm", "deterministic": "euler"}[sampler]
    assert told == f"sample with cfg 1, sampler {name} and the sigmas 1, 0.9, 0.75, 0.5, 0"
    (told,) = export_student(folder, "lora", tmp_path / "lora.safetensors")
    scheduler = {"stochastic": "FlowMatchLCMScheduler", "deterministic": "FlowMatchEulerDiscreteScheduler"}[sampler]
    assert told.startswith(f"sample with {scheduler}, whose config is in {folder / 'scheduler'}, and call")
    assert told.endswith("with sigmas=[1.0, 0.9, 0.75, 0.5], guidance_scale=0.0")


def test_adapters_of_a_network_that_takes_guidance_need_it(tmp_path: Path) -> None:
    """FLUX.1-dev's: the student's folder has the scale in its weights, the network that adapters go on has not."""
    folder = student(tmp_path / "student", FLOW, [1.0, 0.5], "stochastic")
    facts = json.loads((folder / STUDENT_FILE).read_text())
    (folder / STUDENT_FILE).write_text(json.dumps({**facts, "embedded_guidance": 3.5}))
    (told,) = export_student(folder, "lora", tmp_path / "lora.safetensors")
    assert told.endswith("with sigmas=[1.0, 0.5], guidance_scale=3.5")
    (told,) = export_student(folder, "comfy-lora", tmp_path / "lora.safetensors")
    assert told.startswith("sample with cfg 1, guidance 3.5, sampler lcm")


def test_weights_that_keep_their_input_of_guidance_need_it(tmp_path: Path) -> None:
    """FLUX.2-dev's, whose pipeline is called with the scale."""
    folder = student(tmp_path / "student", FLOW, [1.0, 0.5], "stochastic")
    facts = json.loads((folder / STUDENT_FILE).read_text())
    facts |= {"embedded_guidance": 4.0, "call": {**facts["call"], "guidance_scale": 4.0}}
    (folder / STUDENT_FILE).write_text(json.dumps(facts))
    assert _how_to_sample(folder, facts, "comfy")[0].startswith("sample with cfg 1, guidance 4, sampler lcm")
    facts["call"]["guidance_scale"] = 0.0  # folded into the weights, as FLUX.1-dev's
    assert _how_to_sample(folder, facts, "comfy")[0].startswith("sample with cfg 1, sampler lcm")


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_sigmas_of_timesteps_are_eulers(tmp_path: Path, sampler: Sampler) -> None:
    timesteps = [999, 749, 499, 249]
    folder = student(tmp_path / "student", VP, [float(each) for each in timesteps], sampler)
    (told,) = export_student(folder, "comfy-lora", tmp_path / "lora.safetensors")
    scheduler: Any = EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(timesteps=timesteps)
    sigmas = [float(each) for each in told.partition("sigmas ")[2].split(", ")]
    assert sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=1e-4)
    assert sigmas[0] == pytest.approx(14.6146, rel=1e-4)  # Stable Diffusion's largest


def test_one_step_is_eulers(tmp_path: Path) -> None:
    folder = student(tmp_path / "student", VP, [999.0], "stochastic")
    (told,) = export_student(folder, "comfy-lora", tmp_path / "lora.safetensors")
    assert told == "sample with cfg 1, sampler euler and the sigmas 14.6146, 0"
    earlier = student(tmp_path / "earlier", VP, [399.0], "stochastic")  # from noise of variance 1, as DMD2's for SDXL
    assert export_student(earlier, "comfy-lora", tmp_path / "lora.safetensors") == []
    (told,) = export_student(earlier, "lora", tmp_path / "lora.safetensors")
    assert told.startswith("sample with DDIMScheduler")

"""What `export` says of sampling, against the sigmas of diffusers' own schedulers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file

from fdistill.adapters import supported_pipelines
from fdistill.adapters.parametrisation import DirectPrediction, student_scheduler
from fdistill.base.errors import ConfigError
from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.formats.comfy.workflow import ComfySampling, workflow
from fdistill.formats.lora_file import LORA_FILE
from fdistill.noise import FlowSchedule, vp_schedule_from_config
from fdistill.student_kinds import STUDENT_FILE, Sampler
from fdistill.students.export import export_student
from fdistill.students.text_to_image import check_exportable
from support.text_families_flux2 import HAS_FLUX2, dev

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = DirectPrediction(vp_schedule_from_config({**DDPMScheduler(**SD).config, "_class_name": "DDPMScheduler"}), "eps")
FLOW = DirectPrediction(FlowSchedule(), "flow", 1000.0)


def student(folder: Path, form: DirectPrediction, levels: list[float], sampler: Sampler) -> Path:
    """A folder with what `export` reads: adapters of one layer, the scheduler, and the student's file.

    A folder that is there already keeps its network.
    """
    folder.mkdir(exist_ok=True)
    layer, network = "transformer.transformer_blocks.0.attn.to_q", "SD3Transformer2DModel"
    if form is VP:
        layer, network = "unet.mid_block.attentions.0.proj_in", "UNet2DConditionModel"
    tensors = {f"{layer}.lora_{matrix}.weight": torch.ones(2, 2) for matrix in "AB"}
    save_file(tensors, folder / LORA_FILE)
    place = folder / layer.partition(".")[0]
    if not place.is_dir():
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"_class_name": network}))
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


def test_a_student_of_fewer_steps_as_well_says_how(tmp_path: Path) -> None:
    folder = student(tmp_path / "student", FLOW, [1.0, 0.9, 0.75, 0.5], "stochastic")
    facts = json.loads((folder / STUDENT_FILE).read_text())
    (folder / STUDENT_FILE).write_text(json.dumps({**facts, "any_step": True}))
    _, *fewer = export_student(folder, "comfy-lora", tmp_path / "lora.safetensors")
    assert fewer == [
        "for 3 of its steps take the sigmas 1, 0.9, 0.75, 0",
        "for 2 of its steps take the sigmas 1, 0.75, 0",
        "for 1 of its steps take the sigmas 1, 0",
    ]
    _, *fewer = export_student(folder, "lora", tmp_path / "lora.safetensors")
    assert fewer == [
        "for fewer steps change the call: sigmas=[1.0, 0.9, 0.75] for 3 steps, sigmas=[1.0, 0.75] for 2 steps, "
        "sigmas=[1.0] for 1 step"
    ]


def test_adapters_of_a_network_that_takes_guidance_need_it(tmp_path: Path) -> None:
    """FLUX.1-dev's: the student's folder has the scale in its weights, the network that adapters go on has not."""
    folder = student(tmp_path / "student", FLOW, [1.0, 0.5], "stochastic")
    facts = json.loads((folder / STUDENT_FILE).read_text())
    (folder / STUDENT_FILE).write_text(json.dumps({**facts, "embedded_guidance": 3.5}))
    (told,) = export_student(folder, "lora", tmp_path / "lora.safetensors")
    assert told.endswith("with sigmas=[1.0, 0.5], guidance_scale=3.5")
    (told,) = export_student(folder, "comfy-lora", tmp_path / "lora.safetensors")
    assert told.startswith("sample with cfg 1, guidance 3.5, sampler lcm")


@pytest.mark.skipif(not HAS_FLUX2, reason="this diffusers has no FLUX.2")
@pytest.mark.parametrize(("pipeline", "called", "guided"), [("Flux2Pipeline", 4.0, True), ("FluxPipeline", 0.0, False)])
def test_weights_that_keep_their_input_of_guidance_need_it(
    pipeline: str, called: float, guided: bool, tmp_path: Path
) -> None:
    """FLUX.2-dev's, whose pipeline is called with the scale; FLUX.1-dev's have it folded in."""
    folder = student(dev(tmp_path / "student"), FLOW, [1.0, 0.5], "stochastic")
    facts = json.loads((folder / STUDENT_FILE).read_text())
    facts |= {"embedded_guidance": 4.0, "call": {**facts["call"], "guidance_scale": called}, "pipeline": pipeline}
    (folder / STUDENT_FILE).write_text(json.dumps(facts))
    told = export_student(folder, "comfy", tmp_path / "two.safetensors")[-1]
    assert told.startswith(f"sample with cfg 1{', guidance 4' if guided else ''}, sampler lcm")
    nodes = {node["class_type"]: node["inputs"] for node in json.loads((tmp_path / "two.json").read_text()).values()}
    assert nodes.get("FluxGuidance", {}).get("guidance") == (4.0 if guided else None)
    assert nodes["UNETLoader"]["unet_name"] == "two.safetensors"


def test_what_eulers_scheduler_cannot_express_is_refused() -> None:
    """A prediction of x0, which it does not read, and a first level without an image, where it divides by alpha = 0."""
    no_image = vp_schedule_from_config({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})
    for form in (DirectPrediction(VP.schedule, "x0"), DirectPrediction(no_image, "v")):
        denoiser: Any = SimpleNamespace(parametrisation=form)
        check_exportable(denoiser, [999.0, 499.0], "stochastic")
        with pytest.raises(ConfigError, match=r"got deterministic, but Euler's .*; expected stochastic"):
            check_exportable(denoiser, [999.0, 499.0], "deterministic")
    denoiser = SimpleNamespace(parametrisation=VP)
    with pytest.raises(ConfigError, match="expected whole timesteps"):
        check_exportable(denoiser, [999.0, 499.5], "deterministic")


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
    (told,) = export_student(earlier, "comfy-lora", tmp_path / "lora.safetensors")
    assert told.startswith("no workflow is written: this student begins at t = 399")
    (told,) = export_student(earlier, "lora", tmp_path / "lora.safetensors")
    assert told.startswith("sample with DDIMScheduler")


#: ComfyUI's nodes and the inputs without which they do not run, as its API answers under /object_info.
INPUTS = {
    "CheckpointLoaderSimple": {"ckpt_name"},
    "UNETLoader": {"unet_name", "weight_dtype"},
    "CLIPLoader": {"clip_name", "type"},
    "DualCLIPLoader": {"clip_name1", "clip_name2", "type"},
    "TripleCLIPLoader": {"clip_name1", "clip_name2", "clip_name3"},
    "VAELoader": {"vae_name"},
    "LoraLoader": {"model", "clip", "lora_name", "strength_model", "strength_clip"},
    "LoraLoaderModelOnly": {"model", "lora_name", "strength_model"},
    "CLIPTextEncode": {"clip", "text"},
    "CLIPTextEncodePixArtAlpha": {"clip", "text", "width", "height"},
    "CLIPTextEncodeSDXL": {
        *("clip", "text_g", "text_l", "width", "height", "crop_w", "crop_h", "target_width", "target_height")
    },
    "FluxGuidance": {"conditioning", "guidance"},
    "EmptyLatentImage": {"width", "height", "batch_size"},
    "EmptySD3LatentImage": {"width", "height", "batch_size"},
    "EmptyFlux2LatentImage": {"width", "height", "batch_size"},
    "KSamplerSelect": {"sampler_name"},
    "ManualSigmas": {"sigmas"},
    "SamplerCustom": {
        *("model", "add_noise", "noise_seed", "cfg", "positive", "negative", "sampler", "sigmas", "latent_image")
    },
    "VAEDecode": {"samples", "vae"},
    "SaveImage": {"images", "filename_prefix"},
}
#: Which of a node's outputs is what.
OUTPUTS = {"CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"), "LoraLoader": ("MODEL", "CLIP")}
#: What an input that is the output of another node has to be.
KINDS = {"clip": "CLIP", "model": "MODEL", "vae": "VAE"}


@pytest.mark.parametrize("merged", [None, ("my-style.safetensors", 0.8)], ids=["", "with a LoRA"])
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("pipeline", supported_pipelines())
def test_a_workflow_is_a_graph_that_comfyui_runs(
    pipeline: str, adapters: bool, merged: tuple[str, float] | None
) -> None:
    guided = pipeline == "Flux2Pipeline" or (adapters and pipeline == "FluxPipeline")
    sampling = ComfySampling("lcm", [1.0, 0.9, 0.75, 0.5], 3.5 if guided else None)
    made = workflow(
        pipeline, "four.safetensors", adapters=adapters, sampling=sampling, size=512, prompt="a cat", merged=merged
    )
    if made is None:
        assert pipeline in ("SanaPipeline",), "ComfyUI itself has no nodes for it"
        return
    for number, node in made.items():
        assert node["inputs"].keys() == INPUTS[node["class_type"]]
        for name, value in node["inputs"].items():
            if isinstance(value, tuple):
                source = made[value[0]]["class_type"]
                assert int(value[0]) < int(number)
                kinds = OUTPUTS.get(source, ("CLIP" if "CLIPLoader" in source else "MODEL" if "Lo" in source else "",))
                if name in KINDS and source != "VAELoader":
                    assert kinds[value[1]] == KINDS[name]
    used = {str(value[0]) for node in made.values() for value in node["inputs"].values() if isinstance(value, tuple)}
    assert made.keys() - used == {str(len(made))}, "every node but the last is read"
    values = [value for node in made.values() for value in node["inputs"].values()]
    assert "four.safetensors" in values
    assert "1, 0.9, 0.75, 0.5, 0" in values
    types = {node["class_type"] for node in made.values()}
    assert ("LoraLoaderModelOnly" in types) == adapters
    # Without adapters, a whole checkpoint has the merged LoRA in it, and a network alone is without the encoders' part.
    needed = merged is not None and (adapters or "UNETLoader" in types)
    assert ("LoraLoader" in types) == needed
    if needed:
        (inputs,) = (node["inputs"] for node in made.values() if node["class_type"] == "LoraLoader")
        assert (inputs["strength_model"], inputs["strength_clip"]) == (0.8 if adapters else 0.0, 0.8)
    assert ("FluxGuidance" in types) == guided
    if pipeline == "Lumina2Pipeline":
        assert f"{tiny_pipeline(pipeline).system_prompt} <Prompt Start> a cat" in values


def test_a_workflow_lies_beside_the_file(tmp_path: Path) -> None:
    folder = student(tmp_path / "student", FLOW, [1.0, 0.75], "deterministic")
    facts = json.loads((folder / STUDENT_FILE).read_text())
    more = {"pipeline": "StableDiffusion3Pipeline", "image_size": 1024, "prompts": ["a red fox"]}
    (folder / STUDENT_FILE).write_text(json.dumps({**facts, **more}))
    (told,) = export_student(folder, "comfy-lora", tmp_path / "two.safetensors")
    assert f"as the workflow {tmp_path / 'two.json'} does" in told
    nodes = {node["class_type"]: node["inputs"] for node in json.loads((tmp_path / "two.json").read_text()).values()}
    assert nodes["LoraLoaderModelOnly"]["lora_name"] == "two.safetensors"
    assert nodes["ManualSigmas"] == {"sigmas": "1, 0.75, 0"}
    assert nodes["KSamplerSelect"] == {"sampler_name": "euler"}
    assert nodes["EmptySD3LatentImage"] == {"width": 1024, "height": 1024, "batch_size": 1}
    assert nodes["CLIPTextEncode"]["text"] == "a red fox"

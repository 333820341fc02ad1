from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from fdistill.adapters import original_layout
from fdistill.adapters.checkpoint import load_teacher, resolve_checkpoint
from fdistill.adapters.original_names import assemble
from fdistill.base.errors import CheckpointError
from fdistill.formats.comfy import NETWORK
from fdistill.formats.comfy.autoencoder import original_autoencoder
from fdistill.formats.lora_file import read_lora
from fdistill.formats.pipeline_folder import read_weights
from fdistill.formats.single_file import single_file_to_folder
from fdistill.students.export import export_student
from fdistill.teachers.convert import convert
from support.text_families_dit import HAS_Z_IMAGE, z_image
from support.text_families_flux2 import HAS_FLUX2, klein
from support.tiny_stable_diffusion import sd3_base, tiny_pipeline


def checkpoint(kind: str, folder: Path, **scheduler: object) -> tuple[Path, Path]:
    """A pipeline folder and its weights as one file."""
    pipeline = tiny_pipeline(kind, folder / "trained", **scheduler)
    file = folder / "trained.safetensors"
    export_student(pipeline, "comfy", file)
    return pipeline, file


def base_of(pipeline: Path, folder: Path) -> Path:
    """The same pipeline with all weights zero: what a checkpoint does not give shows."""
    shutil.copytree(pipeline, folder)
    for path in folder.rglob("*.safetensors"):
        save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path, {"format": "pt"})
    return folder


def images(folder: Path, kind: str) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    size = {} if kind != "xl" else {"original_size": (8, 8), "target_size": (8, 8)}
    generator = torch.Generator().manual_seed(5)
    return pipeline(
        "a bold seven", num_inference_steps=2, height=8, width=8, generator=generator, output_type="np", **size
    ).images


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_a_checkpoint_becomes_the_pipeline_it_was_written_from(kind: str, tmp_path: Path) -> None:
    pipeline, file = checkpoint(kind, tmp_path, prediction_type="v_prediction")
    folder = single_file_to_folder(file, base_of(pipeline, tmp_path / "base"))
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "xl" else [])):
        expected, found = read_weights(pipeline / part), read_weights(folder / part)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), part
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    assert (images(folder, kind) == images(pipeline, kind)).all()
    assert single_file_to_folder(file, tmp_path / "base") == folder


def test_half_precision_stays(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd1", tmp_path / "trained")
    file = tmp_path / "half.safetensors"
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        export_student(pipeline, "comfy", file, name)
        folder = single_file_to_folder(file, pipeline)
        for part in ("unet", "vae", "text_encoder"):
            exact, found = read_weights(pipeline / part), read_weights(folder / part)
            assert {value.dtype for value in found.values()} == {dtype}
            assert all(torch.equal(exact[key].to(dtype), value) for key, value in found.items())
    tensors = load_file(file)
    save_file(tensors | {f"{NETWORK}out.2.bias": torch.full((4,), 0.1)}, file)
    found = read_weights(single_file_to_folder(file, pipeline) / "unet")
    assert torch.equal(found["conv_out.bias"], torch.full((4,), 0.1))


@pytest.mark.parametrize("prefix", [NETWORK, ""])
def test_a_network_alone_takes_the_rest_from_its_base(prefix: str, tmp_path: Path) -> None:
    pipeline, file = checkpoint("sd1", tmp_path)
    network = {
        prefix + name.removeprefix(NETWORK): value + 1
        for name, value in load_file(file).items()
        if name.startswith(NETWORK)
    }
    save_file(network, tmp_path / "network.safetensors")
    folder = single_file_to_folder(tmp_path / "network.safetensors", pipeline)
    expected, found = read_weights(pipeline / "unet"), read_weights(folder / "unet")
    assert all(torch.equal(expected[name] + 1, found[name]) for name in expected)
    for part in ("vae", "text_encoder"):
        before, after = read_weights(pipeline / part), read_weights(folder / part)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_network_under_the_names_of_diffusers_is_taken_too(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd1", tmp_path / "base")
    weights = {name: value + 1 for name, value in read_weights(pipeline / "unet").items()}
    save_file(weights, tmp_path / "unet.safetensors")
    folder = single_file_to_folder(tmp_path / "unet.safetensors", pipeline)
    found = read_weights(folder / "unet")
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    save_file(weights | {"conv_more.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"conv_more\.weight"):
        single_file_to_folder(tmp_path / "more.safetensors", pipeline)


@pytest.mark.skipif(not HAS_FLUX2, reason="this diffusers has no FLUX.2")
@pytest.mark.parametrize("prefix", [NETWORK, ""])
def test_flux_2s_transformer_alone(prefix: str, tmp_path: Path) -> None:
    """As its publisher has it, and as `fdistill export` writes it."""
    base = klein(tmp_path / "base")
    export_student(base, "comfy", tmp_path / "exported.safetensors")
    file = {
        prefix + name.removeprefix(NETWORK): value + 1
        for name, value in load_file(tmp_path / "exported.safetensors").items()
    }
    save_file(file, tmp_path / "flux2.safetensors")
    folder = single_file_to_folder(tmp_path / "flux2.safetensors", base)
    expected, found = read_weights(base / "transformer"), read_weights(folder / "transformer")
    assert all(torch.equal(value + 1, found[name]) for name, value in expected.items())
    assert (folder / "tokenizer" / "chat_template.jinja").is_file()


@pytest.mark.parametrize("prefix", [NETWORK, ""])
def test_a_transformer_with_or_without_its_autoencoder(prefix: str, tmp_path: Path) -> None:
    base, network = sd3_base(tmp_path / "base")
    changed = {name: value + 1 for name, value in network.state_dict().items()}
    layout = original_layout("SD3Transformer2DModel", changed, network.config)
    file = {prefix + name: value for name, value in assemble(layout or {}, changed).items()}
    vae = {name: value - 1 for name, value in read_weights(base / "vae").items()}
    if prefix:
        file |= {f"first_stage_model.{name}": value for name, value in original_autoencoder(vae).items()}
    save_file({name: value.contiguous() for name, value in file.items()}, tmp_path / "sd3.safetensors")
    folder = single_file_to_folder(tmp_path / "sd3.safetensors", base)
    found = read_weights(folder / "transformer")
    assert all(torch.equal(changed[name], found[name]) for name in changed)
    expected = vae if prefix else read_weights(base / "vae")
    after = read_weights(folder / "vae")
    assert all(torch.equal(expected[name], after[name]) for name in expected)


@pytest.mark.skipif(not HAS_Z_IMAGE, reason="this diffusers has no Z-Image")
def test_a_file_of_z_image_is_read_and_written(tmp_path: Path) -> None:
    pipeline = z_image(tmp_path / "trained")
    assert export_student(pipeline, "comfy", tmp_path / "file.safetensors")[0].startswith("the file holds the network")
    folder = single_file_to_folder(tmp_path / "file.safetensors", base_of(pipeline, tmp_path / "base"))
    expected, found = read_weights(pipeline / "transformer"), read_weights(folder / "transformer")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_folder_depends_on_file_and_base(tmp_path: Path) -> None:
    pipeline, file = checkpoint("sd1", tmp_path)
    folder = single_file_to_folder(file, pipeline)
    StableDiffusionPipeline.from_pretrained(folder)  # whole
    DDIMScheduler(steps_offset=1, prediction_type="v_prediction").save_pretrained(pipeline / "scheduler")
    other_base = single_file_to_folder(file, pipeline)
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    assert len({folder, other_base, single_file_to_folder(file, pipeline)}) == 3
    assert not list(folder.parent.glob(".*"))
    assert len(list(folder.parent.iterdir())) >= 3


KINDS = {
    "Stable Diffusion 1": "sd1",
    "Stable Diffusion 2": "sd2",
    "Stable Diffusion XL": "xl",
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_base_a_checkpoint_says_what_it_is(kind: str, tmp_path: Path) -> None:
    _, file = checkpoint(KINDS[kind], tmp_path)
    with pytest.raises(CheckpointError, match=rf"is {kind}; set teacher_base"):
        single_file_to_folder(file, None)
    for other, name in KINDS.items():
        if other != kind:
            wrong = tiny_pipeline(name, tmp_path / name)
            with pytest.raises(CheckpointError, match=rf"is {kind}, but teacher_base"):
                single_file_to_folder(file, wrong)


def test_the_kinds_of_transformers_are_told_apart(tmp_path: Path) -> None:
    flux = {f"double_blocks.0.img_attn.norm.{part}_norm.scale": torch.zeros(1) for part in ("key", "query")}
    flux["vector_in.in_layer.weight"] = torch.zeros(1)
    sd3 = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}
    for tensors, kind in ((flux, "Flux"), (sd3, "Stable Diffusion 3")):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=rf"is {kind}; set teacher_base"):
            single_file_to_folder(tmp_path / "x.safetensors", None)


def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    pipeline, file = checkpoint("sd1", tmp_path)

    def refused(match: str, path: Path = file, base: Path | None = pipeline) -> None:
        with pytest.raises(CheckpointError, match=match):
            single_file_to_folder(path, base)

    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    refused("expected a file of tensors", tmp_path / "old.ckpt")
    refused(r"model_index\.json", base=tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-100])
    refused("cut short", broken)
    refused("cut short", tmp_path / "missing.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, broken)
    refused("is a LoRA.*teacher_lora", broken)
    save_file({"x": torch.zeros(1)}, broken)
    refused("'x'.*of no known kind", broken)
    tensors = load_file(file)
    left_out = f"{NETWORK}middle_block.0.in_layers.0.weight"
    save_file({name: value for name, value in tensors.items() if name != left_out}, broken)
    refused(r"1 tensors of its network .*'middle_block\.0\.in_layers\.0\.weight' is missing, expected \(16,\)", broken)
    save_file(tensors | {f"{NETWORK}output_blocks.9.0.in_layers.0.weight": torch.zeros(8)}, broken)
    refused(r"'output_blocks\.9\.0\.in_layers\.0\.weight' is \(8,\), expected none", broken)
    save_file(tensors | {f"{NETWORK}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}, broken)
    refused(r"is \(8, 9, 3, 3\), expected \(8, 4, 3, 3\)", broken)
    for name in ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "first_stage_model.quant_conv.bias"):
        save_file({key: value for key, value in tensors.items() if key != name}, broken)
        refused("are missing|does not fit", broken)


def scheduler_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return read


def marked(file: Path, *marks: str, **metadata: str) -> Path:
    save_file(load_file(file) | {mark: torch.zeros(1) for mark in marks}, file, metadata or None)
    return file


@pytest.mark.thorough
def test_a_file_that_says_that_it_predicts_v_is_taken_at_its_word(tmp_path: Path) -> None:
    pipeline, file = checkpoint("xl", tmp_path)
    assert scheduler_of(single_file_to_folder(file, pipeline))["prediction_type"] == "epsilon"
    folder = single_file_to_folder(marked(file, "v_pred"), pipeline)
    assert scheduler_of(folder) == scheduler_of(pipeline) | {"prediction_type": "v_prediction"}
    folder = single_file_to_folder(marked(file, "ztsnr"), pipeline)
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert scheduler_of(folder) == scheduler_of(pipeline) | said
    teacher: Any = load_teacher(folder)
    assert teacher.parametrisation.prediction == "v"
    assert teacher.schedule.alpha(torch.tensor(999.0)) == 0
    v_base = tiny_pipeline("xl", tmp_path / "v", prediction_type="v_prediction")
    assert scheduler_of(single_file_to_folder(file, v_base)) == scheduler_of(v_base) | said


def test_marks_beside_a_network_alone_are_obeyed_and_are_no_part_of_it(tmp_path: Path) -> None:
    pipeline, whole = checkpoint("sd1", tmp_path)
    weights = {name: value.half() for name, value in read_weights(pipeline / "unet").items()}
    published = {
        name.removeprefix(NETWORK): value.half() for name, value in load_file(whole).items() if name.startswith(NETWORK)
    }
    file = tmp_path / "unet.safetensors"
    for tensors in (weights, published):
        save_file(tensors, file)
        folder = single_file_to_folder(marked(file, "v_pred", "ztsnr"), pipeline)
        said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        assert scheduler_of(folder) == scheduler_of(pipeline) | said
        found = read_weights(folder / "unet")
        assert all(torch.equal(weights[name], found[name]) for name in weights)
        assert found.keys() == weights.keys()
        assert found["conv_in.weight"].dtype == torch.float16
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=r"Playground v2\.5, but teacher_base's scheduler is DDIMScheduler"):
            single_file_to_folder(marked(file, "edm_mean", "edm_std"), pipeline)


@pytest.mark.parametrize(("said", "read"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("None", "v_prediction")])
def test_metadata_of_training_scripts_are_a_files_word_too(said: str, read: str, tmp_path: Path) -> None:
    pipeline, file = checkpoint("sd1", tmp_path, prediction_type="epsilon" if said == "v" else "v_prediction")
    folder = single_file_to_folder(marked(file, **{"modelspec.prediction_type": said}), pipeline)
    assert scheduler_of(folder)["prediction_type"] == read


def test_a_checkpoint_that_contradicts_itself_or_its_base_is_refused(tmp_path: Path) -> None:
    pipeline, file = checkpoint("xl", tmp_path)
    tensors = load_file(file)

    def refused(match: str, base: Path, *marks: str, **metadata: str) -> None:
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=match):
            single_file_to_folder(marked(file, *marks, **metadata), base)

    refused("ztsnr says that its noise ends without signal, but it predicts eps", pipeline, "ztsnr")
    refused("v_pred says.*says epsilon", pipeline, "v_pred", **{"modelspec.prediction_type": "epsilon"})
    refused("Playground v2.5, but teacher_base's scheduler is DDIMScheduler", pipeline, "edm_mean", "edm_std")
    refused("CosXL", pipeline, "edm_vpred.sigma_max")
    EDMEulerScheduler().save_pretrained(pipeline / "scheduler")
    refused("scheduler EDMEulerScheduler has no such settings", pipeline, "v_pred")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_a_compiled_or_data_parallel_network_are_read(prefix: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd1", tmp_path / "base")
    weights = {name: value + 1 for name, value in read_weights(pipeline / "unet").items()}
    file = tmp_path / "unet.safetensors"
    save_file({prefix + name: value for name, value in weights.items()}, file)
    found = read_weights(single_file_to_folder(file, pipeline) / "unet")
    assert all(torch.equal(weights[name], found[name]) for name in weights)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file, whose quantized weights are not read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_what_is_no_weights_is_called_by_its_name(content: bytes, says: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd1", tmp_path / "base")
    for name in ("unet.gguf", "unet.safetensors", "unet.ckpt"):
        file = tmp_path / name
        file.write_bytes(content)
        reads: list[Any] = [
            lambda file=file: single_file_to_folder(file, pipeline),
            lambda file=file: resolve_checkpoint(file),
            lambda file=file: convert(file, tmp_path / "converted"),
            lambda file=file: read_lora(file),
        ]
        for read in reads:
            with pytest.raises(CheckpointError, match=says):
                read()
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        load_teacher(pipeline)

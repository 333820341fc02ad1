"""Folders with weights in .bin files: the same network, and nothing of a file is run."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fdistill.adapters.bin_weights import in_float32, with_plain_weights
from fdistill.adapters.checkpoint import find_network, load_denoiser, load_teacher, resolve_checkpoint
from fdistill.base.errors import CheckpointError
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import open_prompt_encoder
from support.families import FAMILIES
from support.tiny_stable_diffusion import tiny_pipeline


def with_bins(folder: Path, shards: int = 1) -> Path:
    """Replaces the weights of a folder by .bin files, as older versions of diffusers and transformers wrote them."""
    for path in list(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        stem = "pytorch_model" if path.stem == "model" else path.stem
        names = (
            [f"{stem}.bin"] if shards == 1 else [f"{stem}-{i:05d}-of-{shards:05d}.bin" for i in range(1, shards + 1)]
        )
        parts: list[dict[str, Any]] = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
        for name, part in zip(names, parts, strict=True):
            torch.save(part, path.parent / name)
        if shards > 1:
            index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            (path.parent / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": index}))
        path.unlink()
    return folder


def prediction(folder: Path | str) -> torch.Tensor:
    teacher = load_teacher(folder)
    torch.manual_seed(0)
    condition = torch.tensor([0, 1]) if teacher.num_classes else None
    level = torch.full((2,), teacher.schedule.t_max / 2)
    return teacher(torch.randn(2, *teacher.sample_shape), level, condition)


@pytest.mark.parametrize("name", ["ddpm", "class-conditional", "dit", "edm-adm", "edm2-latent"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_teacher_of_bins_is_the_same_network(name: str, shards: int, tmp_path: Path) -> None:
    folder = FAMILIES[name][0](tmp_path / "teacher")
    expected, hashed = prediction(folder), open_teacher(TeacherSettings(str(folder)))
    pickled = with_bins(shutil.copytree(folder, tmp_path / "pickled"), shards)
    assert torch.equal(prediction(pickled), expected)
    found = open_teacher(TeacherSettings(str(pickled)))
    assert (found.latents is None) == (hashed.latents is None)
    if found.latents is not None and hashed.latents is not None:
        images = torch.rand(1, 3, 16, 16)
        assert torch.equal(found.latents.moments(images), hashed.latents.moments(images))
    copy = resolve_checkpoint(pickled).folder
    assert copy == resolve_checkpoint(pickled).folder != pickled
    assert not list((copy or Path()).rglob("*.bin*"))
    assert found.checkpoint.fingerprint(found.denoiser)
    if shards == 1:
        assert found.checkpoint.fingerprint(found.denoiser) == hashed.checkpoint.fingerprint(hashed.denoiser)


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_text_encoders_are_read_too(kind: str, tmp_path: Path) -> None:
    folder = tiny_pipeline(kind, tmp_path / "teacher")
    pickled = with_bins(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / "safety_checker").mkdir()
    (pickled / "safety_checker" / "config.json").write_text("{}")
    (pickled / "safety_checker" / "pytorch_model.bin").write_bytes(b"not read")
    encoded = [
        open_prompt_encoder(resolve_checkpoint(place), 8).encode(["a bold seven"])["prompt_embeds"]
        for place in (folder, pickled)
    ]
    assert torch.equal(*encoded)


def test_a_component_with_safetensors_is_left_alone(tmp_path: Path) -> None:
    folder = FAMILIES["dit"][0](tmp_path / "teacher")
    assert with_plain_weights(folder) == folder
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    assert with_plain_weights(folder) == folder
    (folder / "transformer" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"not read")
    assert with_plain_weights(folder) == folder


class Call:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_anything_but_tensors_is_refused(tmp_path: Path) -> None:
    folder = with_bins(FAMILIES["class-conditional"][0](tmp_path / "teacher"))
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    weights = torch.load(path)
    for content, message in (
        (weights | {"call": Call(f"touch {tmp_path / 'ran'}")}, r"refused posix\.system, which no state dict needs"),
        (weights | {"epoch": 3}, "holds no state dict"),
        ([weights], "holds no state dict"),
    ):
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            with pytest.raises(CheckpointError, match=message):
                load_teacher(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_teacher(folder)
    path.unlink()
    for index in ("[]", '{"weight_map": {"a": "../b.bin"}}', "{"):
        path.with_name("diffusion_pytorch_model.bin.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            load_teacher(folder)
    assert not (tmp_path / "ran").exists()


class Hub:
    """`snapshot_download` from a folder."""

    def __init__(self, hub: Path, local: Path):
        self.hub, self.local, self.calls = hub, local, 0

    def __call__(self, hub_id: str, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        self.calls += 1
        for path in self.hub.rglob("*"):
            name = path.relative_to(self.hub).as_posix()
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_file() and wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.local / name)
        return str(self.local)


def test_bins_are_downloaded_only_where_there_are_no_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, local = tiny_pipeline("sd1", tmp_path / "hub"), tmp_path / "local"
    with_bins(hub / "text_encoder")
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.fp16.bin"):
        (hub / name).write_bytes(b"not wanted")
    download = Hub(hub, local)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = resolve_checkpoint("somebody/something").folder
    assert download.calls == 2
    assert [path.relative_to(local).as_posix() for path in local.rglob("*.bin")] == ["text_encoder/pytorch_model.bin"]
    assert (folder or Path()).joinpath("text_encoder", "model.safetensors").is_file()
    assert (folder or Path()).joinpath("unet", "diffusion_pytorch_model.safetensors").is_file()


def as_variant(folder: Path, shards: bool = False) -> Path:
    """A folder that was published in half precision alone, as `save_pretrained(..., variant="fp16")` writes it."""
    for path in list(folder.rglob("*.safetensors")):
        halved = {name: value.half() for name, value in load_file(path).items()}
        if not shards:
            save_file(halved, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
        else:
            names = [f"{path.stem}.fp16-{i:05d}-of-00002.safetensors" for i in (1, 2)]
            parts = [dict(list(halved.items())[i::2]) for i in (0, 1)]
            for name, part in zip(names, parts, strict=True):
                save_file(part, path.with_name(name), {"format": "pt"})
            index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            (path.parent / f"{path.name}.index.fp16.json").write_text(json.dumps({"weight_map": index}))
        path.unlink()
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_in_half_precision_alone_is_read(shards: bool, tmp_path: Path) -> None:
    folder = tiny_pipeline("sd1", tmp_path / "teacher")
    half = as_variant(shutil.copytree(folder, tmp_path / "half"), shards)
    found, whole = load_teacher(half).state_dict(), load_teacher(folder).state_dict()
    assert all(torch.equal(value.half().float(), found[name]) for name, value in whole.items())
    teacher = open_teacher(TeacherSettings(str(half)))
    assert teacher.latents is not None
    for place in (half, folder):
        open_prompt_encoder(resolve_checkpoint(place), 8).encode(["a bold seven"])
    copy = resolve_checkpoint(half).folder or Path()
    assert DiffusionPipeline.from_pretrained(copy) is not None
    assert not list(copy.rglob("*fp16*.safetensors"))


def test_half_precision_bins_are_read_and_whole_ones_preferred(tmp_path: Path) -> None:
    folder = with_bins(FAMILIES["dit"][0](tmp_path / "teacher"))
    whole = prediction(folder)
    path = folder / "transformer" / "diffusion_pytorch_model.bin"
    torch.save(
        {name: value.half() for name, value in torch.load(path).items()}, path.with_name(f"{path.stem}.fp16.bin")
    )
    assert torch.equal(prediction(folder), whole)
    path.unlink()
    torch.testing.assert_close(prediction(folder), whole, rtol=0.02, atol=0.02)
    assert not torch.equal(prediction(folder), whole)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_network_that_was_saved_in_its_wrapper_is_read(kind: str, prefix: str, tmp_path: Path) -> None:
    folder = FAMILIES["dit"][0](tmp_path / "teacher")
    expected = prediction(folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({prefix + name: value for name, value in load_file(path).items()}, path, {"format": "pt"})
    if kind == "bin":
        with_bins(folder)
    assert torch.equal(prediction(folder), expected)


def test_half_precision_is_downloaded_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, local = tiny_pipeline("sd1", tmp_path / "hub"), tmp_path / "local"
    as_variant(hub / "unet")
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(hub, local))
    load_teacher("somebody/something")
    assert [path.name for path in (local / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert [path.name for path in (local / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]


def test_a_trainers_checkpoint_is_named_and_what_it_lacks(tmp_path: Path) -> None:
    """checkpoint-500 of a training script: the network alone, beside the state of its optimiser."""
    pipeline, folder = tiny_pipeline("sd1", tmp_path / "base"), tmp_path / "checkpoint-500"
    shutil.copytree(pipeline / "unet", folder / "unet")
    (folder / "optimizer.bin").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match=r"checkpoint-500: .*noise schedule is not known.*put this network into"):
        open_teacher(TeacherSettings(str(folder)))
    shutil.copytree(pipeline / "scheduler", folder / "scheduler")
    with pytest.raises(CheckpointError, match=r"checkpoint-500 has no model_index\.json.*put this network into"):
        open_prompt_encoder(resolve_checkpoint(folder), 8)
    advised = shutil.copytree(pipeline, tmp_path / "advised", ignore=shutil.ignore_patterns("unet"))
    shutil.copytree(folder / "unet", advised / "unet")
    assert open_teacher(TeacherSettings(str(advised))).latents is not None


@pytest.mark.parametrize("shards", [1, 2])
def test_half_precision_is_read_from_a_copy_in_float32(shards: int, tmp_path: Path) -> None:
    folder = FAMILIES["ddpm"][0](tmp_path / "teacher")
    checkpoint = resolve_checkpoint(folder)
    network = find_network(folder)[1]
    assert in_float32(network) == network
    halves = {name: value.half() for name, value in load_file(*network.glob("*.safetensors")).items()}
    for path in network.glob("*.safetensors"):
        path.unlink()
    names = [f"diffusion_pytorch_model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    names = names if shards > 1 else ["diffusion_pytorch_model.safetensors"]
    parts = [dict(list(halves.items())[i::shards]) for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, network / name, {"format": "pt"})
    if shards > 1:
        index = {
            "metadata": {},
            "weight_map": {key: name for name, each in zip(names, parts, strict=True) for key in each},
        }
        (network / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    copied = in_float32(network)
    assert copied != network
    assert {value.dtype for path in copied.glob("*.safetensors") for value in load_file(path).values()} == {
        torch.float32
    }
    assert in_float32(copied) == copied
    expected, found = (
        load_denoiser(checkpoint).state_dict(),
        load_denoiser(checkpoint, memory_of_files=True).state_dict(),
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name

"""Pipelines of which a part is missing, damaged or of another size: one sentence, and not what a library raises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fdistill.base.errors import CheckpointError
from fdistill.commands.cli import app
from fdistill.commands.ending import one_message
from fdistill.commands.tiny_pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        tiny_pipeline(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def not_a_number(path: Path) -> None:
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path, {"format": "pt"})


def shorten(folder: Path) -> None:
    """A text encoder for a third of the tokens."""
    config = json.loads((folder / "text_encoder/config.json").read_text())
    length = config["max_position_embeddings"] // 3
    edit(folder / "text_encoder/config.json", max_position_embeddings=length)
    weights = folder / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    key = next(name for name in tensors if name.endswith("position_embedding.weight"))
    save_file(tensors | {key: tensors[key][:length].clone()}, weights, {"format": "pt"})


WEIGHTS = "diffusion_pytorch_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "NaN in the network": (lambda folder: not_a_number(folder / "unet" / WEIGHTS), "of its network is not finite"),
    "NaN in the autoencoder": (
        lambda folder: not_a_number(folder / "vae" / WEIGHTS),
        "its autoencoder is not finite",
    ),
    "short encoder": (shorten, "cannot read prompts.*expected tokenizer and text_encoder folders that belong together"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer, which its model_in"),
    "huge network": (
        lambda folder: edit(folder / "unet/config.json", layers_per_block=10**6),
        "unet/config.json: layers_per_block: got 1000000; expected at most 1,000",
    ),
    "huge encoder": (
        lambda folder: edit(folder / "text_encoder/config.json", num_hidden_layers=10**6),
        "text_encoder/config.json: num_hidden_layers: got 1000000; expected at most 1,000",
    ),
    "huge autoencoder": (
        lambda folder: edit(folder / "vae/config.json", layers_per_block=10**6),
        "vae/config.json: layers_per_block: got 1000000; expected at most 1,000",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inspect_says_what_is_damaged(case: str, pipelines: Path, photo: Path, tmp_path: Path) -> None:
    breaks, says = BROKEN[case]
    shutil.copytree(pipelines / "StableDiffusionPipeline", tmp_path / "a")
    breaks(tmp_path / "a")
    for data in ([], ["--data", str(photo)]):
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / "a"), "--device", "cpu", *data])
        with pytest.raises(CheckpointError, match=says):
            raise done.exception or AssertionError(done.output)


def test_a_watermark_needs_no_library_here(pipelines: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelines / "StableDiffusionXLPipeline", tmp_path / "a")
    edit(tmp_path / "a" / "model_index.json", add_watermarker=True)
    output = str(tmp_path / "out")
    drawn = ["generate", str(tmp_path / "a"), "--num-images", "1", "--prompt", "a", "--steps", "1", "--output", output]
    done = CliRunner().invoke(app, drawn)
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "out" / "000000.png").is_file()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_does_not_suffice(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_message():
        raise error
    line = capsys.readouterr().err
    assert "memory does not suffice" in line
    assert "choose a smaller batch" in line
    assert line.count("\n") == 1


def test_other_errors_of_torch_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), one_message():
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("content", ["[]", "{}", "3"])
def test_a_config_that_is_no_object_is_named(content: str, pipelines: Path, tmp_path: Path) -> None:
    base = tmp_path / "a"
    shutil.copytree(pipelines / "StableDiffusionPipeline", base)
    drawn = ["generate", str(base), "--steps", "1", "--num-images", "1", "--prompt", "a"]
    commands = [["inspect", str(base)], [*drawn, "--output", str(tmp_path / "o"), "--sampler", "pipeline"]]
    for place in (
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
    ):
        whole = (base / place).read_text()
        (base / place).write_text(content)
        for command in commands:
            done = CliRunner().invoke(app, command)
            with pytest.raises(CheckpointError, match=rf"a/{place}: cannot be read \(.*; expected a JSON object"):
                raise done.exception or AssertionError(done.output)
        (base / place).write_text(whole)

"""One flipped byte in what fdistill wrote is found when it is read; what earlier versions wrote has no hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fdistill import load_student
from fdistill.adapters.checkpoint import Checkpoint, load_denoiser
from fdistill.base.errors import CheckpointError, DataError
from fdistill.base.hashes import hashed_tensors, noted_files, save_hashed, write_tensors
from fdistill.commands.cli import app
from fdistill.condition import TextCondition
from fdistill.data.embeddings import EmbeddingSource, write_embeddings
from fdistill.data.latents import LatentSource, write_latents
from fdistill.generator import OneStepGenerator
from fdistill.students.folder import save_student
from fdistill.training.snapshots import combine, find_snapshots, save_snapshot

META = {
    "vae": "0123",
    "latent_scale": [0.5],
    "latent_bias": [0.0],
    "pixel_range": [-1.0, 1.0],
    "sampling": "sample",
    "recipe": "adm",
    "resolution": 8,
    "source": "photos",
    "flip": False,
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def without_hashes(facts: dict[str, Any]) -> None:
    """As earlier versions wrote it."""
    facts.pop("files", None)
    facts.pop("sha256_of_this_file", None)


def embeddings(folder: Path) -> None:
    null = TextCondition({"x": torch.zeros(1, 2)})
    rows = TextCondition({"x": torch.ones(2, 2)})
    write_embeddings(folder, [(["a", "b"], rows)], null=null, meta={"encoder": "1", "null_prompt": ""})


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    parts = [(torch.rand(4, 4, 2, 2), torch.arange(4), torch.tensor([0, 1, 0, 1]))]
    write_latents(tmp_path / "latents", parts, META, 4, embeddings)
    return tmp_path / "latents"


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("latents-00000.safetensors", "latents-00000.safetensors is damaged: its hash is not that of what was written"),
        ("text/embeddings-00000.safetensors", "embeddings-00000.safetensors is damaged: its hash"),
        ("text/null.safetensors", "null.safetensors is damaged: its hash"),
    ],
)
def test_a_flipped_byte_of_cached_latents(file: str, says: str, latents: Path) -> None:
    assert len(LatentSource(latents)) == 4
    flip(latents / file)
    with pytest.raises(DataError, match=f"{says}.*; make them again"):
        LatentSource(latents)
    for place in (latents / "latents.json", latents / "text" / "embeddings.json"):
        edit(place, without_hashes)
    assert len(LatentSource(latents)) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampling": "mean"}, "latents.json was changed after it was written"),
        ({"count": 5}, "the count in latents.json is not the sum of its files'"),
    ],
)
def test_an_edited_description_of_latents(change: dict[str, Any], says: str, latents: Path) -> None:
    edit(latents / "latents.json", lambda facts: facts.update(change))
    with pytest.raises(DataError, match=says):
        LatentSource(latents)


def test_an_edited_prompt(latents: Path) -> None:
    file = latents / "text" / "prompts.jsonl"
    file.write_text(file.read_text().replace('"a"', '"c"'))
    with pytest.raises(DataError, match=r"prompts\.jsonl is damaged"):
        LatentSource(latents)
    edit(latents / "text" / "embeddings.json", lambda facts: facts.update(null_prompt="b"))
    with pytest.raises(DataError, match=r"embeddings\.json was changed"):
        EmbeddingSource(latents / "text")


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hashes") / "student"
    origin = Checkpoint("tiny", tiny_teacher)
    generator = OneStepGenerator(load_denoiser(origin), 80.0)
    save_student(generator, folder, origin=origin, latents=None, card={}, config=None, samples=None)
    return folder


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
def test_a_flipped_byte_of_a_student(file: str, student: Path, tmp_path: Path) -> None:
    path = student / file
    whole = path.read_bytes()
    out = str(tmp_path / "out")
    made = ["generate", str(student), "--num-images", "1", "--output", out]
    try:
        flip(path)
        says = f"student .*: {file} is damaged.*; copy the student's folder again"
        for more in ([], ["--sampler", "pipeline"]):
            with pytest.raises(CheckpointError, match=says):
                _run([*made, *more])
        with pytest.raises(CheckpointError, match=says):
            load_student(student)
        assert not Path(out).exists()
    finally:
        path.write_bytes(whole)


def test_the_way_on_with_a_changed_student(student: Path, tmp_path: Path) -> None:
    file = "scheduler/scheduler_config.json"
    before, noted = (student / file).read_text(), (student / "fdistill_student.json").read_text()
    try:
        edit(student / file, lambda facts: facts.update(sigma_min=0.003))
        with pytest.raises(CheckpointError, match='remove its entry under "files" in fdistill_student'):
            load_student(student)
        edit(student / "fdistill_student.json", lambda facts: facts["files"].pop(file))
        load_student(student)
    finally:
        (student / file).write_text(before)
        (student / "fdistill_student.json").write_text(noted)


def _run(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exception is not None
    raise done.exception


def test_a_flipped_byte_of_a_snapshot(tmp_path: Path) -> None:
    save_snapshot(tmp_path, 2, 0.1, {"x": torch.ones(3), "count": torch.tensor(1)})
    save_snapshot(tmp_path, 4, 0.1, {"x": torch.full((3,), 2.0), "count": torch.tensor(2)})
    both = find_snapshots(tmp_path)
    assert combine(both, [-1.0, 2.0])["x"].tolist() == [3.0] * 3
    flip(both[1].path)
    with pytest.raises(CheckpointError, match=r"000004-0\.1.*damaged.*; delete that file to do without it"):
        combine(both, [-1.0, 2.0])
    save_file({"x": torch.full((3,), 4.0), "count": torch.tensor(2)}, both[1].path)  # as earlier versions did
    assert combine(both, [-1.0, 2.0])["x"].tolist() == [7.0] * 3
    save_file({"x": torch.zeros(3)}, both[1].path)
    with pytest.raises(CheckpointError, match="other tensors than in 000002"):
        combine(both, [-1.0, 2.0])


def test_the_hash_counts_names_types_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_hashed({"a": torch.ones(2, 3)}, file)
    for old, new in ((b'"F32"', b'"I32"'), (b"[2,3]", b"[3,2]"), (b'"a"', b'"b"')):
        whole = file.read_bytes()
        assert whole.count(old) == 1
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="damaged"):
            dict(hashed_tensors(file))
        file.write_bytes(whole)
    assert dict(hashed_tensors(file))["a"].shape == (2, 3)


def test_what_is_written_by_hand_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        **{
            f"{dtype}": torch.arange(6).reshape(2, 3).to(dtype)
            for dtype in (torch.float64, torch.float32, torch.float16)
        },
        **{f"{dtype}": torch.arange(4).to(dtype) for dtype in (torch.bfloat16, torch.int64, torch.int32, torch.uint8)},
        'a "name" \u00e9': torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "columns": torch.arange(6.0).reshape(2, 3).t(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    noted = write_tensors(tmp_path / "file.safetensors", tensors, {"format": "pt"})
    assert {"file.safetensors": noted} == noted_files(tmp_path, ["file.safetensors"])
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    with safe_open(tmp_path / "file.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)

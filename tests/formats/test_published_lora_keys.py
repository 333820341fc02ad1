"""Names in exported LoRA files against those of published ones, and those that their readers are known to take.

tests/fixtures/published-lora-keys.json says where each was read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fdistill.base.errors import CheckpointError
from fdistill.formats.lora_file import LORA_FILE, lora_tensors, read_lora
from fdistill.students.export import export_student
from support.lora_students import adapted
from support.text_families import TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_pipelines import load_pipeline
from support.thorough import at_night

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "published-lora-keys.json").read_text(encoding="utf-8")
)["families"]
FAMILIES = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}
SUFFIX = re.compile(r"\.(lora_(A|B|down|up)\.weight|alpha|lokr_w[12])$")


def layer(key: str, prefix: str) -> str:
    """A key's layer as kohya's scripts write it, with N for its numbers."""
    assert key.startswith(prefix), key
    path = SUFFIX.sub("", key.removeprefix(prefix)).replace(".", "_")
    return re.sub(r"(?<=_)\d+(?=_|$)", "N", path)


def projection(path: str) -> tuple[str, str] | None:
    """(list of blocks, projection in a block's attention) of a layer; None outside of attentions."""
    match = re.fullmatch(r"(.+)_N_((?:\w+_)?att(?:n|ention)\d?_\w+)", path)
    return (match[1], match[2]) if match else None


@pytest.mark.parametrize("name", at_night(FAMILIES, lambda name: name == "sd35-large"))
def test_exported_names_are_those_that_published_files_have(name: str, tmp_path: Path) -> None:
    folder = FAMILIES[name][0](tmp_path / name)
    student = adapted(load_pipeline(folder), folder)
    recorded = RECORDED.get(type(student.network).__name__, {"formats": {}, "files": []})
    for naming in ("lora", "comfy-lora"):
        output = tmp_path / f"{naming}.safetensors"
        form = recorded["formats"].get(naming)
        if form is None and naming == "comfy-lora":
            with pytest.raises(CheckpointError, match=r"not known under which names ComfyUI .*--format lora for diff"):
                export_student(folder, naming, output)
            continue
        assert export_student(folder, naming, output) == []
        if form is None:  # no reader, or none on record
            continue
        keys = list(load_file(output))
        assert [key for key in keys if not key.startswith(form["prefix"])] == []
        layers = [SUFFIX.sub("", key.removeprefix(form["prefix"])) for key in keys]
        assert any("." in path for path in layers) == (form["separator"] == ".")
        suffixes = [SUFFIX.search(key) for key in keys]
        assert {found and found[0] for found in suffixes} == set(form["suffixes"])
        made = {layer(key, form["prefix"]) for key in keys}
        for file in recorded["files"]:
            if file["format"] == naming:
                found_in_file(made, {layer(key, file["prefix"]) for key in file["keys"]}, file["complete"])


def found_in_file(made: set[str], published: set[str], complete: bool) -> None:
    """Asserts that published layers are exported, and exported projections of their lists of blocks are published."""
    assert published <= made
    attentions = set(map(projection, published)) - {None}
    assert attentions
    if complete:
        blocks = {found[0] for found in attentions if found}
        assert {found for found in map(projection, made) if found and found[0] in blocks} == attentions


@pytest.mark.parametrize("naming", ["lora", "comfy-lora"])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_reader_without_alphas_gets_the_students_updates(name: str, naming: str, tmp_path: Path) -> None:
    """alpha / rank is in the matrices: each layer's scale is 1, whether the file has an alpha or not."""
    folder = FAMILIES[name][0](tmp_path / name)
    student: Any = adapted(load_pipeline(folder), folder)
    export_student(folder, naming, tmp_path / LORA_FILE)
    read = read_lora(tmp_path / LORA_FILE)
    kohya = name == "sd15" and naming == "comfy-lora"
    prefix = {"sd15": "unet.", "sd3": "transformer."}[name]
    paths = [key.removesuffix(".lora_A.weight") for key in lora_tensors(student.network) if ".lora_A." in key]
    assert len(read) == len(paths) > 10
    for path in paths:
        found = read[f"lora_unet_{path.replace('.', '_')}" if kohya else prefix + path]
        assert found.scale == 1
        expected = student.network.get_submodule(path).get_delta_weight("student").flatten(1)
        torch.testing.assert_close(found.delta(), expected, rtol=1e-5, atol=1e-6)

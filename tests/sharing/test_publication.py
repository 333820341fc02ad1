"""What would be published of students of all kinds: files, licences, scores, and nothing private."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import weights_sha256
from fdistill.base.hashes import check_files, noted_files
from fdistill.sharing.licence import licence_for
from fdistill.sharing.private import private_texts, public_text, replaced
from fdistill.sharing.publication import Publication, prepare
from fdistill.students.hub import student_on_hub
from support.odd_files import FIRST_LAYOUT


def student(base: Path, name: str = "run", **facts: Any) -> Path:
    """A copy of a student, with other facts in its file."""
    folder = shutil.copytree(FIRST_LAYOUT / name / "student", base / "student")
    path = folder / "fdistill_student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


def published(folder: Path, scores: Sequence[Path] = (), licence: str | None = "mit") -> Publication:
    return prepare(folder, "me/one", scores, licence)


def card_of(publication: Publication) -> Any:
    text = publication.files["README.md"]
    assert isinstance(text, bytes)
    return ModelCard(text.decode())


def test_paths_become_their_last_names(tmp_path: Path) -> None:
    (tmp_path / "client" / "photos").mkdir(parents=True)
    values = {
        "teacher": "/home/a user/t v2",
        "data": "client/photos",
        "vae": "~/vaes/one",
        "reference": "../others/real.npz",
        "windows": r"C:\Users\me\model",
        "weights": ["clip=/data/w/clip.pt", "b"],
        "hub": "stabilityai/sd-turbo",
        "prompt": "black and/or white, 3 images/s, </b> https://x.org/a/b",
        "nested": {"eval/fid vs /srv/real": 1.0},
    }
    texts = private_texts(values, tmp_path)
    assert replaced(values, texts) == {
        "teacher": "t v2",
        "data": "photos",
        "vae": "one",
        "reference": "real.npz",
        "windows": "model",
        "weights": ["clip=clip.pt", "b"],
        "hub": "stabilityai/sd-turbo",
        "prompt": values["prompt"],
        "nested": {"eval/fid vs real": 1.0},
    }
    told = public_text("Student of `/home/a user/t v2`, on client/photos, see /var/log/x.txt.", tmp_path, texts)
    assert told == "Student of `t v2`, on photos, see x.txt."


def test_configs_lose_the_folders_that_they_were_loaded_from_and_stay_what_was_noted(tmp_path: Path) -> None:
    folder = student(tmp_path)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/home/me/secret/unet"}))
    facts = json.loads((folder / "fdistill_student.json").read_text())
    facts["files"] = noted_files(folder, ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
    (folder / "fdistill_student.json").write_text(json.dumps(facts))
    files = published(folder).files
    for name, content in files.items():
        path = tmp_path / "sent" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        assert b"secret" not in path.read_bytes()
    check_files(tmp_path / "sent", json.loads((tmp_path / "sent" / "fdistill_student.json").read_text())["files"])


def test_all_files_of_a_student_are_there_and_no_others(tmp_path: Path) -> None:
    folder = student(tmp_path, "lora")
    for name in ("phase-1.safetensors", "phase-2.safetensors", "network.safetensors", "mine.safetensors"):
        save_file({"a": torch.ones(1)}, folder / name)
    for name in ("optimizer.pt", ".env", "unet/notes.md"):
        (folder / name).write_text("private")
    found = published(folder)
    assert {"pytorch_lora_weights.safetensors", "phase-1.safetensors", "phase-2.safetensors", "network.safetensors"} < {
        *found.files
    }
    assert not {"mine.safetensors", "optimizer.pt", ".env", "unet/notes.md"} & {*found.files}
    assert found.notes == ["not uploaded, as no part of a student: .env, mine.safetensors, optimizer.pt, unet/notes.md"]
    assert card_of(found).data.pipeline_tag == "text-to-image"


def test_a_file_that_lists_what_no_student_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text("{}")
    folder = student(tmp_path, files=noted_files(tmp_path, ["key.json"]))
    facts = json.loads((folder / "fdistill_student.json").read_text())
    facts["files"] = {"../key.json": facts["files"]["key.json"]}
    (folder / "fdistill_student.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="lists files that no student has"):
        published(folder)


def test_the_teachers_licence_is_taken_or_asked_for(tmp_path: Path) -> None:
    teacher = tmp_path / "teachers" / "mine"
    teacher.mkdir(parents=True)
    folder = student(tmp_path, teacher=str(teacher), started_from=str(teacher))
    with pytest.raises(ArgumentError, match=r"no model card or LICENSE .* pass --license IDENTIFIER"):
        published(folder, licence=None)
    assert str(published(folder, licence="Apache-2.0").licence) == "apache-2.0"
    (teacher / "LICENSE").write_text("                 Apache License\n           Version 2.0, January 2004\n")
    assert str(published(folder, licence=None).licence) == "apache-2.0"
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: mine-1\nlicense_link: LICENSE.md\n---\n")
    metadata = card_of(published(folder, licence=None)).data.to_dict()
    assert (metadata["license"], metadata["license_name"]) == ("other", "mine-1")
    assert "license_link" not in metadata
    with pytest.raises(ArgumentError, match=r"digits is under apache-2\.0"):
        licence_for(["digits", str(teacher)], folder, None)
    with pytest.raises(ArgumentError, match="expected an identifier of the hub"):
        published(folder, licence="the usual one")


def test_a_teacher_of_the_hub_is_the_base_model(tmp_path: Path) -> None:
    found = published(student(tmp_path, teacher="someone/teacher", started_from="someone/teacher"))
    assert found.base_models == ["someone/teacher"]
    assert card_of(found).data.base_model == "someone/teacher"


def test_scores_of_a_file_are_of_this_student(tmp_path: Path) -> None:
    folder, path = student(tmp_path), tmp_path / "scores.json"
    about = {"protocol": "folder", "checkpoint": "x", "checkpoint_sha256": weights_sha256(folder)}
    about["reference"] = {"name": "/home/me/secret/photos"}  # type: ignore[assignment]
    scores = {"fid@500 vs /home/me/secret/photos": 3.25, "kid": float("nan")}
    spread = {"fid@500 vs /home/me/secret/photos": {"value": 0.125, "of": "20 bootstrap replicates"}}
    path.write_text(json.dumps({"metrics": scores, "spread": spread, "provenance": about}))
    text = str(card_of(published(folder, [path])))
    assert "| fid@500 vs photos | 3.25 +- 0.12 (20 bootstrap replicates) | folder | photos |" in text
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]["metrics"][0]["type"] == "fid"
    path.write_text(json.dumps({"metrics": scores, "provenance": about | {"checkpoint_sha256": "0" * 64}}))
    with pytest.raises(ArgumentError, match="evaluate this student, and pass that file"):
        published(folder, [path])
    path.write_text("{}")
    with pytest.raises(ArgumentError, match="lacks 'metrics'; expected a file of `fdistill evaluate --output`"):
        published(folder, [path])


def test_what_users_wrote_into_a_card_stays(tmp_path: Path) -> None:
    folder = student(tmp_path)
    path = folder / "README.md"
    path.write_text(path.read_text().replace("tags: [", "language: en\ntags: [mine, ") + "\nThanks to all.\n")
    card = card_of(published(folder))
    assert card.data.language == "en"
    assert "mine" in card.data.tags
    assert "Thanks to all." in card.text
    path.write_text("---\n[\n---\n")
    with pytest.raises(CheckpointError, match="the metadata at its head cannot be read"):
        published(folder)


def test_what_is_no_id_asks_nothing_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir()
    for name in ("digits", "a/b", "./x", "/x/y", "x/y/z"):
        assert student_on_hub(name) is None
    for name in ("name", "a/b/c", "a b/c", "../x"):
        with pytest.raises(ArgumentError, match="expected user/name"):
            prepare(tmp_path, name)
    with pytest.raises(CheckpointError, match="holds no student"):
        prepare(tmp_path, "me/one")

"""A student is pushed to a stand-in of the hub by the real client, and comes back by its id, bit by bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from fdistill import distill, generate, load_student
from fdistill.commands.cli import app
from fdistill.config.reading import load_config
from support.hub import TOKEN, Hub, running_hub

ROOT = Path(__file__).parents[2]
#: Runs commands of fdistill one after another, each with the token that goes before it, and prints what it ended with.
COMMANDS = """
import json, os, sys
from typer.testing import CliRunner
from fdistill.commands.cli import app
for token, *arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    done = CliRunner().invoke(app, arguments)
    print("ENDED" + json.dumps([done.output, "" if done.exception is None else str(done.exception)]))
"""


#: Words of pushes behind the token that the client has.
PUSHES = [
    [TOKEN, "me/dry", "--dry-run"],
    [TOKEN, "me/one", "--message", "First"],
    [TOKEN, "others/one"],
    ["", "me/new"],
    ["hf_stale", "me/new"],
    [TOKEN, "me/one", "--license", "none-such"],
    [TOKEN, "me/seen", "--public"],
    [TOKEN, "me/seen"],
    [TOKEN, "me/seen", "--public", "--license", "mit"],
    [TOKEN, "me/seen", "--public", "--revision", "best"],
]


@dataclass(frozen=True)
class Ended:
    """What a command printed, and the message of the error that it ended with."""

    output: str
    error: str


def ended(hub: Hub, home: Path, *commands: list[Any], **more: str) -> list[Ended]:
    """What commands ended with in one new process, whose client knows this hub and this cache alone.

    Args:
        commands: words, behind the token that the client has.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([[str(word) for word in command] for command in commands])],
        capture_output=True,
        text=True,
        check=False,
        env=hub.environment(home) | {"PYTHONPATH": str(ROOT)} | more,
        cwd=home.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.removeprefix("ENDED") for line in done.stdout.splitlines() if line.startswith("ENDED")]
    return [Ended(*json.loads(line)) for line in found]


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with scores and samples whose teacher lies in a folder that nobody else should know of."""
    base = tmp_path_factory.mktemp("home of a user")
    teacher = shutil.copytree(tiny_teacher, base / "secret client" / "their-teacher")
    (teacher / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# A teacher\n")
    folder = base / "runs" / "first"
    settings = [f"teacher={teacher}", "batch_size=4", "iterations=2", "device=cpu", "log.tracker=none"]
    settings += ["eval.every=1", "eval.num_images=70", "eval.metrics=[class_accuracy]", "log.samples_every=2"]
    distill(load_config("digits", settings), output=folder)
    (folder / "student" / "optimizer.pt").write_bytes(b"not for others")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


@pytest.fixture(scope="module")
def pushed(run: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """What `PUSHES` ended with, and drawing with the students of two branches, of which one is there."""
    home = tmp_path_factory.mktemp("pushing") / "home"
    pushes = [[token, "push", run, *words] for token, *words in PUSHES]
    drawn = ["--num-images", "3", "--device", "cpu", "--output"]
    drawings = [[TOKEN, "generate", f"me/seen@{branch}", *drawn, home / branch] for branch in ("best", "none")]
    return ended(hub, home, *pushes, *drawings)


def pixels(folder: Path) -> Any:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_files_are_listed_and_those_of_the_student_alone_are_pushed(pushed: list[Ended], run: Path, hub: Hub) -> None:
    dry, done, *_ = pushed
    assert (dry.error, done.error) == ("", "")
    assert "me/dry" not in hub.repositories
    repository = hub.repositories["me/one"]
    files = repository.files()
    assert repository.private
    assert repository.messages == ["First"]
    assert sorted(files) == [
        "README.md",
        "fdistill_student.json",
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
        "teacher_samples.png",
        "training_config.yaml",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    for name, content in files.items():
        assert f"{len(content):>15,}  {name}\n" in done.output, name
        assert f"  {name}\n" in dry.output
    assert "not uploaded, as no part of a student: optimizer.pt" in dry.output
    assert files["teacher_samples.png"] == (run / "samples" / "teacher.png").read_bytes()


def test_a_pushed_student_comes_back_by_its_id(pushed: list[Ended], run: Path, hub: Hub, tmp_path: Path) -> None:
    """Its images are those of the student on the disk, bit by bit, from the hub and from the cache alone."""
    fresh, images = tmp_path / "fresh", tmp_path / "images"
    drawn = ["--num-images", "12", "--seed", "3", "--device", "cpu", "--output"]
    scored = ["evaluate", "me/one", "--num-images", "70", "--metrics", "class_accuracy", "--device", "cpu"]
    there, measured, nobody = ended(
        hub,
        fresh,
        [TOKEN, "generate", "me/one", *drawn, images / "hub"],
        [TOKEN, *scored],
        [TOKEN, "generate", "me/none", *drawn, images / "none"],
    )
    assert (there.error, measured.error) == ("", "")
    assert "class_accuracy@70" in measured.output
    assert "the hub gave no model of that id (RepositoryNotFoundError)" in nobody.error
    cached, absent = ended(
        hub,
        fresh,
        [TOKEN, "generate", "me/one", *drawn, images / "cache"],
        [TOKEN, "generate", "me/none", *drawn, images / "none"],
        HF_HUB_OFFLINE="1",
    )
    assert cached.error == ""
    assert "the hub gave no model of that id (HF_HUB_OFFLINE=1 and the cache has none)" in absent.error
    assert "or download the folder elsewhere and pass its path" in absent.error
    generate(run, num_images=12, seed=3, device="cpu", output=images / "own")
    for name in ("hub", "cache"):
        assert (pixels(images / name) == pixels(images / "own")).all()
    (snapshot,) = (fresh / "hub" / "models--me--one" / "snapshots").iterdir()
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    with torch.no_grad():
        assert torch.equal(load_student(snapshot)(noise, labels), load_student(run)(noise, labels))


def test_what_is_pushed_names_no_folder_of_the_user(pushed: list[Ended], run: Path, hub: Hub) -> None:
    for name, content in hub.repositories["me/one"].files().items():
        for secret in (b"secret client", b"home of a user", str(run.parents[1].parent).encode(), b"/tmp/"):
            assert secret not in content, (name, secret)
        assert not name.endswith((".yaml", ".md")) or b"their-teacher" in content


def test_the_card_has_licence_scores_and_pictures(pushed: list[Ended], run: Path, hub: Hub) -> None:
    text = hub.repositories["me/one"].files()["README.md"].decode()
    card: Any = ModelCard(text)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert card.data.license == "creativeml-openrail-m"
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.base_model is None
    assert {"one-step", "distillation", "fdistill", "diffusers"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type) == ("digits", "class_accuracy")
    assert result.metric_value == record["eval/class_accuracy@70"]
    assert "| ![Teacher](teacher_samples.png) | ![Student](samples.png) |" in text
    assert f"| class_accuracy@70 | {result.metric_value:.4g} | digits |" in text
    assert 'from_pretrained("me/one"' in text
    assert "creativeml-openrail-m (README.md of their-teacher)" in text


def test_a_refused_push_says_what_to_do(pushed: list[Ended], run: Path, hub: Hub) -> None:
    offline = CliRunner().invoke(app, ["push", str(run), "me/one"])  # as all tests are
    assert str(offline.exception).endswith("HF_HUB_OFFLINE is set, so nothing is uploaded; unset it, and push again")
    others, unknown, stale, licence, first, private, public, branch = pushed[2:10]
    assert "your token may not write to others; make one with write access" in others.error
    assert unknown.error.startswith("push me/new: no token says who you are; run `hf auth login`")
    assert "the hub does not accept your token; run `hf auth login` with a new one" in stale.error
    assert "the hub refuses the metadata of README.md" in licence.error
    assert set(hub.repositories) == {"me/one", "me/seen"}
    assert (first.error, public.error, branch.error) == ("", "", "")
    assert "everybody can see it; pass --public if that is meant, or choose another name" in private.error
    assert "their-teacher's licence is creativeml-openrail-m" in public.output
    seen = hub.repositories["me/seen"]
    assert b"license: mit" in seen.files()["README.md"]
    assert b"license: creativeml-openrail-m" in seen.files("best")["README.md"]


def test_a_branch_comes_back_by_its_name(
    pushed: list[Ended], hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    loaded, absent = pushed[10:]
    assert loaded.error == ""
    commits = [path.name for path in tmp_path_factory.getbasetemp().rglob("models--me--seen/snapshots/*")]
    branches = hub.repositories["me/seen"].branches
    assert commits == [branches["best"]] != [branches["main"]]
    assert "'me/seen@none': no such folder, and the hub gave no model of that id (RevisionNotFound" in absent.error


@pytest.mark.thorough  # the client's own work
def test_a_push_that_broke_off_is_taken_up(run: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        hub.broken_commits = 1
        broken, whole = ended(hub, tmp_path / "home", *[[TOKEN, "push", run, "me/one"]] * 2)
        sent = [request for request in hub.requests if request.startswith("PUT")]
        assert "the upload broke off" in broken.error
        assert "push again when the connection is back: large files that arrived are not sent again" in broken.error
        assert whole.error == ""
        assert len(hub.repositories["me/one"].commits) == 2
        assert len(sent) == len(set(sent)) == len(hub.repositories["me/one"].large)

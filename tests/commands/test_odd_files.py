"""Odd files of every format at every command: each ends in one line or works, leaves nothing half-written and takes
little memory. FDISTILL_FUZZ=500 throws 500 of them, from another seed each day, as a nightly run does; by default 30.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fdistill import distill
from fdistill.commands.cli import main
from fdistill.commands.tiny_pipelines import tiny_pipeline
from support.odd_files import FIRST_LAYOUT, odd_file, odd_folder, odd_images

NIGHTLY = int(os.environ.get("FDISTILL_FUZZ", "0"))
COUNT = NIGHTLY or 30
SEED = int(os.environ.get("FDISTILL_FUZZ_SEED", time.strftime("%Y%m%d") if NIGHTLY else "0"))
SECONDS, MEMORY = 30, 2**30

IMAGES = [
    "images.zip",
    "edm.zip",
    "deflated.zip",
    "images.npz",
    "compressed.npz",
    "shard.tar",
    "cifar-10-python.tar.gz",
]
PROMPTS = ["prompts.txt", "prompts.jsonl"]
PUBLISHED = ["network.pkl", "plain.pkl", "weights.pt", "weights.bin", "weights.safetensors"]


class TooSlow(BaseException):
    """No command may catch it."""


@dataclass(frozen=True)
class Place:
    """Where one trial happens.

    Attributes:
        draw: its random numbers.
        folder: an empty folder for its input.
        output: what a command may write; not there yet.
        teacher, text, run: a whole teacher of 20,000 parameters, one that takes prompts, and a run of the first.
    """

    draw: random.Random
    folder: Path
    output: Path
    teacher: Path
    text: Path
    run: Path

    def file(self, *names: str) -> str:
        return str(odd_file(list(names), self.folder, self.draw))

    def images(self) -> str:
        return str(odd_images(self.folder, self.draw)) if self.draw.random() < 0.4 else self.file(*IMAGES)

    def checkpoint(self, *sources: Path) -> str:
        return str(odd_folder(self.draw.choice(sources), self.folder, self.draw))


TEXT = FIRST_LAYOUT / "lora" / "student"
STUDENTS = [FIRST_LAYOUT / name / "student" for name in ("run", "few-step", "edm-run", "tiue", "lora")]


def _dry(place: Place, *settings: str) -> list[str]:
    return ["distill", "digits", "images.workers=1", "device=cpu", *settings, "--dry-run"]


def _text(place: Place, *settings: str) -> list[str]:
    fixed = ("data=null", "method=diff-instruct", "student_level=999", "condition_dropout=0", f"teacher={place.text}")
    return _dry(place, *fixed, *settings)


def _resumed(place: Place) -> list[str]:
    run = odd_folder(place.run, place.folder, place.draw)
    return ["distill", str(run / "config.yaml"), "--resume", "--output", str(run)]


#: What is tried: a command with an odd file or folder in each place that takes one.
TRIALS: dict[str, Callable[[Place], list[str]]] = {
    "config": lambda p: ["distill", p.file("config.yaml", "small.yaml"), f"teacher={p.teacher}", "--dry-run"],
    "smoke": lambda p: ["distill", p.file("config.yaml", "small.yaml"), "--smoke", "--dry-run"],
    "data": lambda p: _dry(p, f"teacher={p.teacher}", f"data={p.images()}"),
    "teacher": lambda p: _dry(p, f"teacher={p.checkpoint(p.teacher, p.text)}"),
    "student.checkpoint": lambda p: _dry(p, f"teacher={p.teacher}", f"student.checkpoint={p.checkpoint(p.teacher)}"),
    "fake_score.checkpoint": lambda p: _dry(p, f"teacher={p.teacher}", f"fake_score.checkpoint={p.checkpoint(p.run)}"),
    "prompts of distill": lambda p: _text(p, f"prompts={p.file(*PROMPTS)}"),
    "teacher_lora": lambda p: _text(p, f"prompts={prompts(p)}", f"teacher_lora={p.file('lora.safetensors')}"),
    "resume": _resumed,
    "generate": lambda p: ["generate", p.checkpoint(*STUDENTS), "--num-images", "2"],
    "generate from a teacher": lambda p: [
        *("generate", p.checkpoint(p.teacher, p.text), "--num-images", "1", "--steps", "1"),
    ],
    "pipeline": lambda p: ["generate", p.checkpoint(*STUDENTS), "--num-images", "1", "--sampler", "pipeline"],
    "prompts of generate": lambda p: [
        *("generate", str(p.text), "--num-images", "1", "--steps", "1", "--prompts", p.file(*PROMPTS)),
    ],
    "evaluate": lambda p: ["evaluate", p.images(), "--metrics", "fd_digits", "--replicates", "0"],
    "reference of evaluate": lambda p: [
        *("evaluate", "digits", "--num-images", "70", "--steps", "1", "--metrics", "fd_digits", "--replicates", "0"),
        *("--reference", p.file("moments.npz", *IMAGES)),
    ],
    "prompts of evaluate": lambda p: [
        *("evaluate", str(images(p)), "--protocol", "digits-t2i", "--metrics", "clip_digits"),
        *("--prompts", p.file(*PROMPTS)),
    ],
    "weights": lambda p: [
        *("evaluate", str(images(p)), "--protocol", "folder", "--reference", str(images(p)), "--weights"),
        f"inception={p.file('weights.pt', 'weights.safetensors')}",
    ],
    "compare": lambda p: ["compare", p.file("scores.json"), p.file("scores.json"), "--output", str(p.output)],
    "reference": lambda p: ["reference", p.images(), "--output", f"{p.output}.npz"],
    "convert": lambda p: ["convert", p.file(*PUBLISHED), "--output", str(p.output)],
    "convert --like": lambda p: [
        *("convert", p.file(*PUBLISHED), "--output", str(p.output), "--like", str(p.teacher)),
        *("--student-level", "80"),
    ],
    "convert --base": lambda p: ["convert", p.file(*PUBLISHED), "--output", str(p.output), "--base", str(p.text)],
    "convert --family": lambda p: ["convert", p.file(*PUBLISHED), "--output", str(p.output), "--family", "dit"],
    "export": lambda p: [
        *("export", p.checkpoint(TEXT), "--format", p.draw.choice(("lora", "comfy", "comfy-lora"))),
        *("--output", f"{p.output}.safetensors"),
    ],
    "inspect": lambda p: ["inspect", p.checkpoint(p.teacher, *STUDENTS)],
    "data of inspect": lambda p: ["inspect", str(p.teacher), "--data", p.images()],
    "cache": lambda p: ["cache", p.images(), "--teacher", str(p.text), "--workers", "1", "--output", str(p.output)],
    "ema": lambda p: ["ema", p.checkpoint(FIRST_LAYOUT / "run"), "--sigma-rel", "0.12", "--output", str(p.output)],
    "any argument": lambda p: [p.draw.choice(("generate", "evaluate", "inspect", "convert")), p.file("one.png")],
}
#: Commands that write a folder wherever they are tried.
NEED_OUTPUT = {"distill", "generate", "convert"}


def prompts(place: Place) -> Path:
    path = place.folder / "whole.txt"
    path.write_text("a bold seven\n")
    return path


def images(place: Place) -> Path:
    path = place.folder / "whole"
    if not path.exists():
        odd_images(place.folder / "of", random.Random(0))
        path.mkdir()
        for number, file in enumerate(sorted((place.folder / "of").rglob("???.png"))[:70]):
            (path / f"{number:03d}.png").write_bytes(file.read_bytes())
    return path


def arguments(trial: str, place: Place) -> list[str]:
    found = TRIALS[trial](place)
    return [*found, "--output", str(place.output)] if found[0] in NEED_OUTPUT and "--output" not in found else found


@pytest.fixture(scope="module")
def whole_run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"log.every": 1, "log.samples_every": 0, "log.tracker": "none", "device": "cpu"}
    folder = tmp_path_factory.mktemp("runs") / "run"
    distill("digits", output=folder, iterations=1, batch_size=4, teacher=str(tiny_teacher), **settings)
    return folder


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A block that may take so many seconds, and so much memory beside what the process has."""

    def stop(*_: object) -> None:
        raise TooSlow

    status = Path("/proc/self/status")
    used = status.read_text().split("VmData:")[1].split()[0] if status.is_file() else None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        if used is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(used) * 1024 + MEMORY, before[1]))
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def run_command(given: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit status of a command, and what it wrote to stderr."""
    said = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["fdistill", *given])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        try:
            with limited():
                main()
        except SystemExit as stopped:
            return int(stopped.code or 0), said.getvalue()
    return 0, said.getvalue()


def fault(trial: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> tuple[str | None, int | None]:
    """(what is wrong with how a command ended, None if nothing is; its exit status)."""
    given, before = arguments(trial, place), set(place.output.parent.iterdir())
    try:
        status, said = run_command(given, monkeypatch)
    except TooSlow:
        return f"took more than {SECONDS} s: {given}", None
    except BaseException as error:  # whatever would be a traceback
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "typer" not in frame.filename]
        places = "\n".join(f"{frame.filename}:{frame.lineno} {frame.line}" for frame in frames[-6:])
        return f"{given}\n{places}\n{type(error).__name__}: {str(error)[:500]}", None
    finally:
        gc.collect()
    wrong = wrong_lines(status, said)
    if status:
        wrong += [f"left behind: {path}" for path in set(place.output.parent.iterdir()) - before]
    cache = Path(os.environ["FDISTILL_CACHE"])
    wrong += [f"half-written: {path}" for path in cache.rglob("*") if ".partial" in path.name]
    wrong += ["executed what it read"] if Path("executed").exists() else []
    return "\n".join([str(given), *wrong]) if wrong else None, status


def wrong_lines(status: int, said: str) -> list[str]:
    """Lines of stderr that should not be there: all but warnings, progress, accounts of what was read, and one error
    where there is one.
    """
    read = "data|reference|samples|prompts|checkpoint|teacher"
    expected = re.compile(rf"(warning|({read})( [^:]+)?): ")
    lines = [line for line in said.splitlines() if line.strip() and not expected.match(line) and "|" not in line]
    if status == 0:
        return [line for line in lines if "error" in line.lower()]
    if status == 2:
        return [] if "Usage" in said else lines
    if status != 1 or not lines or not lines[0].startswith("error: ") or len(lines[0]) > 3_000:
        return lines or [f"status {status}"]
    listed = lines[0].startswith("error: config")  # one line for each wrong setting
    return [] if listed else lines[1:]


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "text"
    tiny_pipeline("StableDiffusionPipeline").save_pretrained(folder)
    return folder


def test_odd_files(
    tiny_teacher: Path, text_teacher: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    faults, ends = [], []
    names = list(TRIALS)
    for number in range(COUNT):
        trial, draw = names[number % len(names)], random.Random(SEED * 100_003 + number)
        folder = tmp_path / f"{number}"
        (folder / "in").mkdir(parents=True)
        (folder / "out").mkdir()
        place = Place(draw, folder / "in", folder / "out" / "made", tiny_teacher, text_teacher, whole_run)
        found, status = fault(trial, place, monkeypatch)
        ends.append(status)
        if found is not None:
            faults.append(f"--- {trial}, input {number} of seed {SEED}: {found}")
    assert not faults, f"{len(faults)} of {COUNT}\n" + "\n".join(faults)
    assert ends.count(1) > COUNT / 3, "most odd files are refused"
    assert ends.count(0) > COUNT / 20, "and some are whole"

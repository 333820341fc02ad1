"""`fdistill demo`: a student beside its teacher, what each image takes, and the page in a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.commands import demo as demo_command
from fdistill.commands import side_by_side
from fdistill.commands.cli import app
from fdistill.commands.side_by_side import Pair, Wish, draw, open_pair
from fdistill.generation.generate import generate
from fdistill.student_kinds import STUDENT_FILE
from support.browser import REQUIRED, running_browser
from support.odd_files import FIRST_LAYOUT

CPU = torch.device("cpu")
TEACHER, FEW, ONE, TEXT = (FIRST_LAYOUT / name for name in ("teacher", "few-step/student", "run", "lora/student"))
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None and not REQUIRED, reason="needs `pip install 'fdistill[demo]'`"
)


@pytest.fixture(scope="module")
def few() -> Pair:
    return open_pair(str(FEW), str(TEACHER), CPU)


def test_the_images_are_those_of_generate_and_are_counted(few: Pair, tmp_path: Path) -> None:
    """Enlarged by a whole factor; of the teacher with the steps that were asked for."""
    student, teacher = draw(few, Wish(seed=5, images=3, label=4, teacher_steps=2))
    assert teacher is not None
    for drawn, checkpoint, steps in ((student, FEW, None), (teacher, TEACHER, 2)):
        folder = tmp_path / str(steps)
        generate(checkpoint, num_images=3, output=folder, seed=5, class_labels=[4], num_steps=steps, device="cpu")
        for number, image in enumerate(drawn.images):
            assert image.size == (256, 256)
            expected = np.array(Image.open(folder / f"{number:06d}.png"))
            assert np.array_equal(np.array(image)[16::32, 16::32], expected)
    assert (student.evaluations, teacher.evaluations) == (2, 3)
    assert student.seconds > 0
    assert teacher.seconds > 0


def test_a_student_of_two_steps_can_take_one(few: Pair) -> None:
    assert list(few.steps) == [2, 1]
    assert few.same_noise
    one, _ = draw(few, Wish(seed=0, images=1, steps=1, teacher_steps=1))
    assert one.evaluations == 1
    with pytest.raises(ArgumentError, match="steps: got 3, expected one of 1, 2"):
        draw(few, Wish(seed=0, images=1, steps=3))


def test_a_teacher_that_cannot_be_opened_is_left_out_with_the_reason(
    few: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(str(ONE), None, CPU)  # its teacher was at teacher/, seen from where it was trained
    assert pair.teacher is None
    assert re.match(r"The teacher is not shown: .*'teacher'.*no such folder", pair.reason)
    assert draw(pair, Wish(seed=0, images=1))[1] is None
    assert list(pair.steps) == [1]
    monkeypatch.chdir(FIRST_LAYOUT)
    assert open_pair(str(ONE), None, CPU).teacher is not None
    unlike = open_pair(str(FEW), "digits-t2i", CPU)
    assert unlike.reason == ("The teacher is not shown: digits-t2i is for prompts, and the student for 10 classes.")
    with pytest.raises(CheckpointError, match="no such folder"):
        open_pair("nowhere", None, CPU)


def test_a_folder_does_not_choose_which_code_runs(tmp_path: Path) -> None:
    folder = shutil.copytree(FEW, tmp_path / "student")
    config = folder / "training_config.yaml"
    config.write_text(re.sub("^teacher: .*", "teacher: os:getcwd", config.read_text(), flags=re.MULTILINE))
    assert "names code, which no student's folder may run" in open_pair(str(folder), None, CPU).reason
    assert open_pair(str(folder), str(TEACHER), CPU).reason == ""
    config.unlink()
    facts = json.loads((folder / STUDENT_FILE).read_text())
    (folder / STUDENT_FILE).write_text(json.dumps({**facts, "teacher": None}))
    assert "the student's folder names none; name it with --teacher" in open_pair(str(folder), None, CPU).reason
    assert open_pair(str(folder), str(TEACHER), CPU).reason == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "seed: got nothing, expected a whole number from 0 to 4,294,967,295"),
        ({"seed": -1}, "seed: got -1"),
        ({"images": 17}, "images: got 17, expected a whole number from 1 to 16"),
        ({"teacher_steps": 10**6}, "teacher's steps: got 1000000"),
        ({"prompt": "a" * 1001}, "prompt: got 1,001 characters, expected at most 1,000"),
    ],
)
def test_what_is_asked_for_has_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        replace(Wish(seed=0, images=1), **changes)


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None)
    error = CliRunner().invoke(app, ["demo", str(FEW)]).exception
    assert isinstance(error, ArgumentError)
    assert str(error) == "demo: its page needs gradio; install it with pip install 'fdistill[demo]'"


@needs_gradio
def test_a_port_that_is_taken() -> None:
    """Whoever chooses another one gets a page, as the tests below do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        error = CliRunner().invoke(app, ["demo", str(FEW), "--port", str(taken.getsockname()[1])]).exception
    assert "cannot be had at 127.0.0.1 (Address already in use); choose another one, or leave --port out" in str(error)


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of a page that the command serves."""
    command = [sys.executable, "-m", "fdistill", "demo", *arguments, "--device", "cpu", "--no-browser"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert child.stdout is not None
    try:
        said = child.stdout.readline()
        found = re.fullmatch(r"demo: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", said)
        assert found is not None, said
        yield found[1]
    finally:
        child.terminate()
        assert child.wait(30) == 128 + 15


class Seen:
    """A page in a browser, and what it has complained of or asked of other hosts."""

    def __init__(self, browser: Any, address: str, width: int, scheme: str):
        self.page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._asked)
        self._address = address
        self.page.goto(address)
        self.page.wait_for_selector("#draw")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self._address, "data:", "blob:")):
            self.wrong.append(request.url)

    def images(self, side: str) -> list[str]:
        """Addresses of the images of a side, all of which are loaded and have a size."""
        self.page.wait_for_function(
            f"(all => all.length && all.every(i => i.complete && i.naturalWidth))"
            f"([...document.querySelectorAll('#{side}-images img')])"
        )
        return [image.get_attribute("src") for image in self.page.query_selector_all(f"#{side}-images img")]

    def draw(self) -> None:
        """Asks for images, and waits until others are there than before, or none."""
        # Not the parts as they are, over which Gradio writes how long it has been drawing.
        now = "[...document.querySelectorAll('#student-images img, .told')].map(p => p.src || p.innerText).join()"
        before = self.page.evaluate(now)
        self.page.click("#draw")
        self.page.wait_for_function(f"before => {now} !== before", arg=before)
        self.page.wait_for_timeout(500)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as opened:
        yield opened


@needs_gradio
def test_a_page_shows_both_with_other_images_for_another_seed(browser: Any) -> None:
    with served(str(FEW), "--teacher", str(TEACHER)) as address:
        seen = Seen(browser, address, 1280, "light")
        assert "Both start from the same noise." in seen.page.inner_text("body")
        seen.draw()
        first = [seen.images(side) for side in ("student", "teacher")]
        assert [len(images) for images in first] == [8, 8]
        for side, evaluations in (("student", 2), ("teacher", 35)):
            cost = seen.page.inner_text(f"#{side}-cost")
            assert re.search(rf"{evaluations} network evaluations and [\d.e-]+ s for each image", cost), cost
        seen.page.fill("#seed input", "7")
        seen.draw()
        second = [seen.images(side) for side in ("student", "teacher")]
        assert not {*first[0], *first[1]} & {*second[0], *second[1]}

        seen.page.fill("#seed input", "-1")
        seen.draw()
        assert seen.page.inner_text(".told") == (
            "Nothing was drawn: seed: got -1, expected a whole number from 0 to 4,294,967,295."
        )
        assert seen.page.query_selector_all("#student-images img, #teacher-images img") == []
        assert seen.wrong == []


@needs_gradio
def test_a_prompt_is_shown_as_text(browser: Any) -> None:
    """On a telephone, in the dark, without the teacher; nothing is wider than the screen."""
    prompt = "<img src=x onerror=\"document.title='run'\"><b>a seven</b>"
    with served(str(TEXT)) as address:
        seen = Seen(browser, address, 390, "dark")
        assert seen.page.inner_text(".told").startswith("The teacher is not shown: ")
        seen.page.fill("#prompt textarea, #prompt input", prompt)
        seen.draw()
        seen.images("student")
        assert prompt in seen.page.inner_text("#student-cost")
        assert seen.page.query_selector("#student-cost img, #student-cost b") is None
        assert seen.page.title() == "fdistill demo"
        assert seen.page.query_selector("#teacher-images") is None
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
        assert seen.wrong == []


def test_the_command_line_imports_no_gradio() -> None:
    code = "import sys, fdistill.commands.cli\nassert not {'gradio', 'rich.live', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_more_is_not_asked_of_the_page_than_one_draws() -> None:
    assert side_by_side.MOST_SEED < 2**53, "JavaScript counts no further"

"""What README, docs, cards and heads of configs mention exists: links, files, modules, tests, commands and settings."""

from __future__ import annotations

import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from pydantic import BaseModel

from fdistill.commands.cli import app
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("fdistill/assets/*/README.md")),
]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MENTIONING = [path.relative_to(ROOT) for path in (*PAGES, *CONFIGS)]
# The last is of the method that docs/extending.md adds.
OPTIONS = {option for method in METHODS.values() for option in method.options} | {"strength"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

pages = pytest.mark.parametrize("page", [path.relative_to(ROOT) for path in PAGES], ids=str)
mentioning = pytest.mark.parametrize("page", MENTIONING, ids=str)


def text_of(page: Path) -> str:
    """A page; of a config its comments, joined where a sentence goes on in the next line."""
    text = (ROOT / page).read_text()
    if page.suffix == ".yaml":
        return "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return text


def anchors(path: Path) -> set[str]:
    """What its headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_of_tests() -> set[str]:
    return {name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)\(", path.read_text())}


def commands(text: str) -> list[list[str]]:
    """Words behind `fdistill` of every line, in bash blocks and heads of configs, and code span that begins with it."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^(?:Teacher|Data): (fdistill [^(\n]+)", text, re.MULTILINE)  # in the head of a config
    spans = re.findall(r"`((?:accelerate launch -m )?fdistill [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    typed = [part for line in lines for part in re.findall(r"do (.*?); done", line) or [line]]
    typed = [line.replace("accelerate launch -m ", "").replace("$steps", "9") for line in (*typed, *spans)]
    found = [shlex.split(line, comments=True) for line in typed if "fdistill" in line]
    return [
        words[1:] for words in found if words[0:1] == ["fdistill"] and words[1] not in ("-h", "--help", "--version")
    ]


def complete(words: list[str]) -> bool:
    """Whether it is a command as one would type it, and not a mention of one."""
    options = {option for parameter in COMMANDS[words[0]].params if parameter.required for option in parameter.opts}
    required = {option for option in options if option.startswith("--")}
    return len(words) > 2 and required <= set(words) and not re.search(r"\.\.\.|NAME|LEVEL| N\b", " ".join(words))


def check_setting(key: str) -> None:
    """`section.name` is a setting of a config; a method's own settings stand in the `objective` section."""
    if key.removeprefix("objective.") in OPTIONS:
        return
    model: type[BaseModel] = DistillConfig
    *sections, name = key.split(".")
    for section in sections:
        inner = model.model_fields[section].annotation
        assert isinstance(inner, type), key
        model = inner
    assert name in model.model_fields, key


def sections() -> list[str]:
    kinds = {name: field.annotation for name, field in DistillConfig.model_fields.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)]


@pages
def test_links_lead_somewhere(page: Path) -> None:
    path = ROOT / page
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#)?([^)]*)\)", path.read_text()):
        if not target.startswith("http"):
            linked = path if not target else (path.parent / target)
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@mentioning
def test_files_exist(page: Path) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", text_of(page))  # links start at the page's folder, and have a test of their own
    for name in re.findall(r"(?<![\w/<>.-])((?:[\w-]+/)+[\w-]+\.(?:py|sh|yaml|md))\b", text):
        if "NAME" not in name:
            assert (ROOT / name).is_file() or (ROOT / "fdistill" / name).is_file(), name


@mentioning
def test_modules_and_their_names_exist(page: Path) -> None:
    for name in re.findall(r"\bfdistill((?:\.[A-Za-z_]\w*)+)", text_of(page)):
        here: object = importlib.import_module("fdistill")
        for part in name[1:].split("."):
            if isinstance(here, ModuleType) and not hasattr(here, part):
                here = importlib.import_module(f"{here.__name__}.{part}")
            else:
                here = getattr(here, part)


@mentioning
def test_tests_exist(page: Path) -> None:
    for name in re.findall(r"`(test_\w+)`", text_of(page)):
        assert name in names_of_tests(), name


@mentioning
def test_settings_exist(page: Path) -> None:
    pattern = rf"`((?:{'|'.join(sections())})\.\w+)[=:`\[ ]"
    for key in re.findall(pattern, text_of(page)):
        if not key.endswith((".txt", ".json", ".png")):
            check_setting(key)


@mentioning
def test_commands_can_be_typed(page: Path) -> None:
    """The command line takes every command as it stands, except for files that only a reader has."""
    for words in commands(text_of(page)):
        command = COMMANDS[words[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words
        if complete(words):
            context = command.make_context(words[0], list(words[1:]))
            if words[0] == "distill":
                (arguments,) = (
                    parameter.name for parameter in command.params if parameter.param_type_name == "argument"
                )
                name, *overrides = context.params[arguments]
                load_config(name, overrides)


def test_these_tests_find_what_they_look_for() -> None:
    """A pattern that matches nothing would let everything pass."""
    block = "```bash\nfdistill ema RUN --sigma-rel 0.1 --output b  # why\n```"
    text = f"`accelerate launch -m fdistill distill digits`\n{block}"
    assert commands(text) == [["ema", "RUN", "--sigma-rel", "0.1", "--output", "b"], ["distill", "digits"]]
    assert [complete(words) for words in commands(text)] == [True, False]
    found = [words for page in PAGES for words in commands(text_of(page.relative_to(ROOT)))]
    assert sum(complete(words) for words in found) > 30


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_it_reaches(path: Path) -> None:
    assert re.search(r"^# Reach: .*\d", path.read_text(), re.MULTILINE)

"""`fdistill init`. Imports no torch before it is called."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fdistill.base.errors import ArgumentError, FDistillError
from fdistill.base.files import atomic_file
from fdistill.base.process import importing
from fdistill.commands.init.answers import GOALS, Hardware, check_new, read_goal, read_hardware, read_steps

if TYPE_CHECKING:
    from fdistill.commands.init.draft import Draft
    from fdistill.commands.init.sources import DataAnswer
    from fdistill.commands.init.teachers import TeacherAnswer

T = TypeVar("T")

#: Answer -> the question about it.
QUESTIONS = {
    "teacher": "Teacher: digits, digits-t2i, digit-pairs, a folder, a file of weights, or a hub id",
    "base": "This is a file. Folder or hub id of the pipeline that it was made from",
    "data": "Data: a folder or archive of images, a folder of `fdistill cache`, a .txt file of prompts, an embedded "
    "data set (digits, digit-captions, digit-pairs), or teacher-samples",
    "hardware": "Hardware: cpu, a GPU's memory as in 24gb, or several as in 2x80gb",
    "steps": "Steps that the student takes for an image, 1 to 8",
    "goal": f"Goal: {', '.join(f'{name} ({meaning})' for name, meaning in GOALS.items())}",
}


def init(
    teacher: Annotated[
        str | None, typer.Option(help="An embedded name, a folder, a hub id, or a file of weights with --base.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="For a file of weights: folder or hub id of the pipeline that it was made from.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images, a folder of fdistill cache, a .txt file of prompts, an embedded name, or teacher-samples."
        ),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="cpu, a GPU's memory as in 24gb, or several GPUs as in 2x80gb.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Steps that the student takes for an image, 1 to 8.")] = None,
    goal: Annotated[str | None, typer.Option(help="quality, diversity, speed or lora.")] = None,
    output: Annotated[Path, typer.Option(help="The YAML file to write; one that exists is kept.")] = Path("my.yaml"),
) -> None:
    """Write a config for your teacher, data and hardware.

    It asks five questions, and a comment in the config says of each setting why it has its value. An answer may be
    given as an option, and is then not asked for. Without a terminal, as in a script, all must be given. Only the
    teacher's config files are read, not its weights.

    \b
    Example: fdistill init
    Example: fdistill init --teacher digits --data digits --hardware cpu --steps 1 --goal quality --output my.yaml
    """
    check_new(output)
    given = {"teacher": teacher, "data": data, "hardware": hardware, "steps": steps, "goal": goal}
    missing = [f"--{name}" for name, answer in given.items() if answer is None]
    if missing and not can_ask():
        raise ArgumentError(
            f"init: there is no terminal to ask on, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "missing; pass --teacher, --data, --hardware, --steps and --goal"
        )
    with importing():
        from fdistill.commands.init.choices import draft_of
        from fdistill.commands.init.fitting import fit
        from fdistill.commands.init.sources import read_data
        from fdistill.commands.init.teachers import needs_base, read_teacher
        from fdistill.commands.init.writing import as_yaml

    def opened(name: str) -> TeacherAnswer:
        asked = base is None and teacher is None and needs_base(name)
        return read_teacher(name, typer.prompt(QUESTIONS["base"]) if asked else base)

    found = _answer("teacher", teacher, opened)
    source = _answer("data", data, lambda text: read_data(text, found))
    machine = _answer("hardware", hardware, read_hardware)
    number = _answer("steps", steps, read_steps)
    aim = _answer("goal", goal, lambda text: read_goal(text, takes_prompts=found.takes_prompts))
    draft = draft_of(found, source, machine, number, aim)
    fit(draft, machine, lambda text: typer.echo(text, err=True))
    draft.config()
    commands = _next_commands(draft, source, machine, output)
    answers = {"teacher": found.name, "data": source.name, "hardware": str(machine), "steps": str(number), "goal": aim}
    text = as_yaml(draft, answers, commands)
    check_new(output)
    with atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(f"config: {output} (from the recipe {draft.recipe})\n{draft.memory}\nNext:")
    for command in commands:
        typer.echo(f"  {shlex.join(command)}")


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty()


def _answer(name: str, given: str | None, read: Callable[[str], T]) -> T:
    """What an option says, or what the question is answered with, which is asked again until it can be read."""
    if given is not None:
        return read(given)
    while True:
        try:
            return read(str(typer.prompt(QUESTIONS[name])).strip())
        except FDistillError as error:
            typer.secho(str(error), fg=typer.colors.RED, err=True)


def _next_commands(draft: Draft, data: DataAnswer, hardware: Hardware, output: Path) -> list[list[str]]:
    """From what has to be made first to the run itself."""
    config, folder = str(output), f"runs/{output.stem}"
    commands = [*draft.before]
    if draft.get("teacher_base") is None:
        seen = ["--data", data.name] if data.kind in ("images", "to encode") else []
        commands.append(["fdistill", "inspect", str(draft.get("teacher")), *seen])
    limits = ["--gpus", str(hardware.gpus), "--memory", f"{hardware.gigabytes:g}"] if hardware.gpus else []
    commands.append(["fdistill", "plan", config, *limits])
    if "smoke" in draft.values:
        commands.append(["fdistill", "distill", config, "--smoke", "--output", f"{folder}-smoke"])
    commands.append(["fdistill", "distill", config, "--dry-run", "--output", folder])
    many = ["accelerate", "launch", "--num_processes", str(hardware.gpus), "-m"] if hardware.gpus > 1 else []
    return [*commands, [*many, "fdistill", "distill", config, "--output", folder]]

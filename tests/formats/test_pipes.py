"""A pipe in place of weights would be waited for without end."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fdistill.adapters.checkpoint import resolve_checkpoint
from fdistill.base.errors import CheckpointError, FDistillError
from fdistill.base.torch_files import read_torch_file
from fdistill.commands.cli import app
from fdistill.formats.lora_file import read_lora
from fdistill.teachers.convert import convert


@pytest.mark.parametrize("read", [resolve_checkpoint, read_torch_file, read_lora, lambda path: convert(path, "made")])
def test_a_pipe_is_no_checkpoint(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a pipe or a device, which may never end; expected a file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["distill", "PIPE", "--dry-run"], "config 'PIPE': SPECIAL; expected a YAML file"),
        (["distill", "data=PIPE", "--dry-run"], "data 'PIPE': SPECIAL; expected a folder"),
        (["distill", "student.checkpoint=PIPE", "--dry-run"], "checkpoint 'PIPE': SPECIAL; expected a file"),
        (["inspect", "digits", "--data", "PIPE"], "data 'PIPE': SPECIAL; expected a folder"),
        (["cache", "PIPE", "--teacher", "digits"], "data 'PIPE': SPECIAL; expected a folder"),
        (["generate", "digits", "--num-images", "1", "--prompts", "PIPE"], "prompts PIPE: SPECIAL; expected a file of"),
        (["generate", "PIPE", "--num-images", "1"], "checkpoint 'PIPE': SPECIAL; expected a file"),
        (["evaluate", "PIPE", "--protocol", "digits"], "checkpoint 'PIPE': SPECIAL; expected a file"),
        (["evaluate", "digits", "--protocol", "digits", "--prompts", "PIPE"], "prompts PIPE: SPECIAL"),
        (["evaluate", "digits", "--protocol", "folder", "--reference", "PIPE"], "PIPE.*: SPECIAL; expected a folder"),
        (["evaluate", "PIPE.npz", "--protocol", "digits"], "PIPE.npz.*: SPECIAL; expected images"),
        (["reference", "PIPE", "--protocol", "folder"], "data 'PIPE': SPECIAL; expected a folder"),
        (["compare", "PIPE", "digits"], "PIPE.*: SPECIAL"),
        (["ema", "PIPE", "--sigma-rel", "0.1"], "student 'PIPE': SPECIAL; expected"),
        (["export", "PIPE", "--format", "comfy"], "student 'PIPE': SPECIAL; expected"),
        (["convert", "PIPE"], "PIPE: SPECIAL; expected a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_every_command_says_that_it_was_given_a_pipe(arguments: list[str], says: str, tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    os.mkfifo(f"{pipe}.npz")
    given = [argument.replace("PIPE", pipe) for argument in arguments]
    made = tmp_path / ("out.npz" if arguments[0] == "reference" else "out.safetensors")
    output = [] if arguments[0] in ("compare", "inspect") else ["--output", str(made)]
    done = CliRunner().invoke(app, [*given, *output])
    assert isinstance(done.exception, FDistillError), done.output
    pattern = re.escape(says).replace(re.escape(".*"), ".*").replace("PIPE", re.escape(pipe))
    assert re.search(pattern.replace("SPECIAL", "is a pipe or a device, which may never end"), str(done.exception)), (
        done.exception
    )
    assert not made.exists()

"""A pipe in place of weights would be waited for without end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fdistill.adapters.checkpoint import resolve_checkpoint
from fdistill.base.errors import CheckpointError
from fdistill.base.torch_files import read_torch_file
from fdistill.formats.lora_file import read_lora
from fdistill.teachers.convert import convert


@pytest.mark.parametrize("read", [resolve_checkpoint, read_torch_file, read_lora, lambda path: convert(path, "made")])
def test_a_pipe_is_no_checkpoint(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a pipe or a device, which may never end; expected a file"):
        read(tmp_path / "pipe")

"""Files and folders that appear whole or not at all: written beside their final name, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fdistill.errors import OutputError


def _explained(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}; free some space or choose another output path")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside the block (full disk, missing rights) into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise _explained(path, error) from error


def partial_path(path: Path) -> Path:
    """Where `atomic_file` and `atomic_folder` write before they rename."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends, removed when it fails."""
    temporary = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; takes the place of `path` when the block ends, removed when it fails."""
    temporary, old = partial_path(path), path.with_name(f".{path.name}.old")
    with writing(path):
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if path.exists():
                path.replace(old)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

"""Files and folders that appear whole or not at all, what is made once and kept in the cache, and hashes of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fdistill.base.errors import OutputError

#: The suffixes of configs, tokenizers, schedulers and weights. Pickles and other formats are left out.
KEPT_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
_SAMPLES, _SAMPLE = 256, 2**16  # places in a file, bytes read at each; files up to 16 MB are read whole


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside the block (full disk, missing rights) into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another output path"
        ) from error


def partial_path(path: Path) -> Path:
    """Where `atomic_file` and `atomic_folder` write before they rename."""
    return path.with_name(f".{path.name}.partial")


def check_file(path: Path) -> None:
    """Raises OutputError unless `path` can name a file to write."""
    with writing(path):
        if not path.name or path.is_dir():
            raise OutputError(f"output {path}: is a folder; expected the name of a file")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            what = "no folder" if not parent.is_dir() else "a folder that cannot be written"
            raise OutputError(f"cannot write {path}: {parent} is {what}; choose another place")


def claim_folder(path: Path) -> Path:
    """The absolute path of a folder that does not exist; an empty one is removed.

    Raises:
        OutputError: something is there already, or an empty folder that cannot be replaced.
    """
    with writing(path):
        path = path.resolve()
        if path == Path.cwd().resolve():
            raise OutputError(f"output {path}: is the current folder; expected a folder that does not exist yet")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"output {path}: exists and is not an empty folder; choose another")
        if path.is_dir():
            path.rmdir()
    return path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends, removed when it fails."""
    check_file(path)
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
    """A temporary folder to fill; takes the place of `path` when the block ends, removed when it fails.

    An old folder at `path` is set aside until the new one has its name. If the process is stopped in between, the next
    call puts the old folder back.
    """
    temporary, old = partial_path(path), path.with_name(f".{path.name}.old")
    with writing(path):
        if old.exists() and not path.exists():
            old.replace(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if path.exists():
                path.replace(old)
            try:
                temporary.replace(path)
            except OSError:
                if old.exists():
                    old.replace(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object; ValueError if it does not, OSError if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:  # its repr has the whole file in it
        raise ValueError(f"not UTF-8 text at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def is_variant(path: Path) -> bool:
    """Whether a file holds weights of another variant, such as "model.fp16.safetensors"."""
    return path.suffix == ".safetensors" and "." in path.stem


def link_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Gives `target` files that stand below `source`, at the same places: weights as hard links if the disk allows
    them, the rest as copies.
    """
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), place)  # a file of the hub's cache is a link itself
                continue
            except OSError:
                pass  # another disk
        shutil.copyfile(path, place)


def sha256_of_files(paths: Iterable[Path]) -> str:
    """The hash, in hexadecimal, of the contents of files one after another; their names do not count."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def sampled_sha256(paths: Iterable[Path], folder: Path) -> str:
    """The hash, in hexadecimal, of each file's name below `folder`, its size, and bytes at evenly spaced places: whole
    files may have tens of gigabytes.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def weights_sha256(folder: Path) -> str:
    """The hash of all safetensors files below a folder, in the order of their paths."""
    return sha256_of_files(sorted(folder.rglob("*.safetensors")))


_SCRATCH: ContextVar[Path | None] = ContextVar("scratch", default=None)


def cache_folder() -> Path:
    """$FDISTILL_CACHE, or fdistill/ in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FDISTILL_CACHE") or Path(home) / "fdistill")


@contextmanager
def nothing_cached() -> Iterator[None]:
    """Inside the block the cache is read and not written: what it lacks goes into a temporary folder, which is deleted
    at the end of the block.
    """
    if _SCRATCH.get() is not None:
        yield
        return
    with TemporaryDirectory(prefix="fdistill-") as folder:
        token = _SCRATCH.set(Path(folder))
        try:
            yield
        finally:
            _SCRATCH.reset(token)


def cache_path(*parts: str) -> Path:
    """Where something is in the cache, or where it is to be written if it is not there yet."""
    path, scratch = cache_folder().joinpath(*parts), _SCRATCH.get()
    return path if scratch is None or path.exists() else scratch.joinpath(*parts)


def cached_folder(kind: str, key: Mapping[str, Any]) -> Path:
    """Where `made_once` puts the folder of this kind and key."""
    return cache_path(kind, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32])


def made_once(kind: str, key: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
    """The folder $FDISTILL_CACHE/<kind>/<hash of key>, which is made if it is not there yet.

    Args:
        kind: a folder's name, such as "merged".
        key: everything that the content depends on, as JSON can say it.
        fill: writes the content into an empty folder.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    path = cached_folder(kind, key)
    if path.is_dir():
        return path
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # another run may be making the same folder
    with atomic_folder(own) as temporary:
        fill(temporary)
    try:
        own.replace(path)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)  # the other run was first
        if not path.is_dir():
            raise
    return path

"""Files and folders that appear whole or not at all, what is made once and kept in the cache, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from fdistill.base.errors import OutputError
from fdistill.base.locks import locked
from fdistill.base.reading import not_here, parse_json, read_bounded

#: The suffixes of configs, tokenizers, schedulers and weights. Pickles and other formats are left out.
KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
#: Folders of names for what is open already: a rename would replace the name and not reach what is open.
_OPEN = ("/dev", "/dev/fd", "/proc/self/fd")
_SAMPLES, _SAMPLE = 256, 2**16  # places in a file, bytes read at each; files up to 16 MB are read whole


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside the block (full disk, missing rights), or what safetensors makes of one, into an
    OutputError that names `path`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        said = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {said}; {_way_out(error)}") from error


def _way_out(error: OSError | SafetensorError) -> str:
    """What to do about an error while writing."""
    number = getattr(error, "errno", None)
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if number in full or any(f"os error {code}" in str(error) for code in full):  # safetensors has no number
        return "free some space or choose another output path"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a place that you may write to"
    return "check the path, or choose another one"


def partial_path(path: Path) -> Path:
    """A name beside `path` for what is not whole yet; every call gives another one, in every process."""
    return _beside(path, f".{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def _beside(path: Path, ending: str) -> Path:
    """A hidden name beside `path`, which is no longer than file systems allow."""
    encoded = os.fsencode(path.name)
    return path.with_name(f".{path.name if len(encoded) <= 180 else hashlib.sha256(encoded).hexdigest()}{ending}")


def is_leftover(name: str, of: str = "") -> bool:
    """Whether a file's name is one of `partial_path`, for a file of any name or of this one."""
    start = re.escape(_beside(Path(of), "").name) if of else r"\..+"
    return re.fullmatch(start + r"(\.\d+-[0-9a-f]{8})?\.partial", name) is not None  # earlier versions had no number


def remove_leftovers(folder: Path, of: str = "") -> None:
    """Removes what killed processes left in a folder; for the process that holds the lock on what they wrote."""
    for found in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(found.name, of):
            if found.is_dir():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether `path` takes bytes one after another: a pipe, a terminal, /dev/null; /dev/stdout even if it is a file."""
    if not path.exists():
        return False
    mode = path.stat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or (str(path.absolute().parent) in _OPEN and path.is_file())


def check_file(path: Path) -> None:
    """Raises OutputError unless `path` can name a file to write: a new one, one that may be replaced, or a stream."""
    with writing(path):
        if not path.name or path.is_dir():
            raise OutputError(f"output {path}: is a folder; expected the name of a file")
        if path.exists() and not path.is_file() and not is_stream(path):
            raise OutputError(f"output {path}: is a device or a socket; expected the name of a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise OutputError(f"cannot write {path}: the file there may not be written; choose another name")
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OutputError(f"cannot write {path}: a link that leads back to itself; choose another name")
        parent = next(folder for folder in target.parents if folder.exists())
        if not is_stream(path) and (not parent.is_dir() or not os.access(parent, os.W_OK)):
            what = "no folder" if not parent.is_dir() else "a folder that cannot be written"
            raise OutputError(f"cannot write {path}: {parent} is {what}; choose another place")


@contextmanager
def claimed_folder(path: Path) -> Iterator[Path]:
    """The absolute path of a folder that does not exist; inside the block no other process gets it. An empty one is
    removed.

    Raises:
        OutputError: something is there already, an empty folder cannot be replaced, or another process has claimed the
            path; the message names that process.
    """
    given, path = path, Path(os.path.realpath(path))
    if path == Path.cwd().resolve():
        raise OutputError(f"output {path}: is the current folder; expected a folder that does not exist yet")
    with ExitStack() as stack:
        with writing(path):
            stack.enter_context(locked(_beside(path, ".lock"), f"output {given}"))
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise OutputError(f"output {path}: exists and is not an empty folder; choose another")
            if path.is_dir():
                path.rmdir()
            remove_leftovers(path.parent, path.name)
        yield path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends, removed when it fails.

    A link is followed, and a file that is replaced leaves its permissions to the new one. A pipe or device gets the
    bytes instead of being replaced.
    """
    check_file(path)
    with writing(path):
        if is_stream(path):
            with TemporaryDirectory(prefix="fdistill-") as folder:
                temporary = Path(folder) / path.name
                yield temporary
                with temporary.open("rb") as made, path.open("ab") as stream:
                    shutil.copyfileobj(made, stream)
            return
        target = Path(os.path.realpath(path))
        temporary = partial_path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _filling(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which is gone at the end of the block unless it has been renamed."""
    with writing(path):
        temporary = partial_path(path)
        temporary.mkdir(parents=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; becomes `path` when the block ends, removed when it fails. A link is followed.

    Raises:
        OutputError: the folder cannot be written, or something that is no empty folder has come to be at `path`. That
            is left as it is, and the new folder is kept under a name that the message says.
    """
    target = Path(os.path.realpath(path))
    with _filling(target) as temporary:
        yield temporary
        try:
            temporary.replace(target)
        except OSError as error:
            if not target.exists():
                raise
            names = (target.with_name(f"{target.name}-{number}") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            temporary.replace(kept)
            raise OutputError(f"output {path}: something else is there by now; what was made is in {kept}") from error


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Like `atomic_folder`, but takes the place of a folder at `path`. No other process may write there: hold a lock.

    The old folder is set aside until the new one has its name. If the process is stopped in between, the next call puts
    the old folder back.
    """
    path = Path(os.path.realpath(path))
    old = _beside(path, ".old")
    with writing(path):
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(old, ignore_errors=True)
        remove_leftovers(path.parent, path.name)
    with _filling(path) as temporary:
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


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object; ValueError if it does not, OSError if it cannot be read."""
    try:
        value = parse_json(read_bounded(path).decode("utf-8"))
    except UnicodeDecodeError as error:  # its repr has the whole file in it
        raise ValueError(f"not UTF-8 text at byte {error.start}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


#: How files begin that people take for weights, and what to say of them.
_NOT_WEIGHTS = {
    b"GGUF": "is a GGUF file, whose quantized weights are not read; take the safetensors that it was made from",
    b"version https://git-lfs": "is what git LFS leaves in place of a file; fetch the file with `git lfs pull`",
    b"<!doctype html": "is a web page instead of the file; download the file again, for instance with `hf download`",
}


def not_weights(path: Path) -> str | None:
    """What a file is, as the end of a sentence, if it is something that people take for weights; otherwise None."""
    special = not_here(path, "")
    if special:
        return f"{special}; expected a file"
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        return None
    found = (what for begin, what in _NOT_WEIGHTS.items() if start.startswith(begin) or start.lower().startswith(begin))
    return next(found, None)


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

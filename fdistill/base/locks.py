"""Locks that one process holds while it writes something; they end with the process, however it ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fdistill.base.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows, where nothing is refused
    fcntl = None  # type: ignore[assignment]

#: Lock files that this process holds -> what is written there. The system's locks do not keep a process from itself,
#: and are lost when it opens and closes the file once more.
_HELD: dict[Path, str] = {}


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` inside the block. In the end it is gone, and so are empty folders made for it.

    The lock is the system's. A file that a killed process left behind locks nothing, and a child process does not hold
    what its parent holds. Where the file system has no locks, nothing is refused.

    Args:
        path: of the lock file.
        what: is written there, for the message.

    Raises:
        OutputError: another process holds the lock; the message names the process and its machine.
    """
    path = Path(os.path.realpath(path))
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _acquired(path, what)
        _HELD[path] = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        try:
            os.write(descriptor, _HELD[path].encode())
            yield
        finally:
            del _HELD[path]
            path.unlink(missing_ok=True)  # while it is still held: whoever comes now makes a file of their own
            os.close(descriptor)
    finally:
        _remove_empty(made)


def check_free(path: Path, what: str) -> None:
    """Raises OutputError, which names the process, if another process holds the lock file `path`."""
    path = Path(os.path.realpath(path))
    if path not in _HELD and (writer := _holder(path)):
        raise _taken(what, writer)


def _acquired(path: Path, what: str) -> int:
    """The descriptor of the open lock file, which is locked."""
    while path not in _HELD:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(descriptor) and _is_still_there(path, descriptor):
            os.ftruncate(descriptor, 0)
            return descriptor
        gone = not _is_still_there(path, descriptor)
        os.close(descriptor)
        if not gone:
            break
    raise _taken(what, _HELD.get(path) or _holder(path) or "another process")


def _taken(what: str, writer: str) -> OutputError:
    return OutputError(f"{what}: {writer} is writing there; wait until it has ended, or choose another place")


def _holder(path: Path) -> str | None:
    """The other process that holds a lock file, in words; None if no other process does."""
    if fcntl is None or not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return (file.read().strip() or "another process") if _is_taken(error) else None
    return None


def _lock(descriptor: int) -> bool:
    """Whether the lock was free, or the file system has none."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not _is_taken(error)
    return True


def _is_taken(error: OSError) -> bool:
    """Whether a lock was not to be had because another process has it, and not for want of locks."""
    return error.errno in (errno.EACCES, errno.EAGAIN)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether `path` is the open file: its last holder may have removed it before it was locked."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return

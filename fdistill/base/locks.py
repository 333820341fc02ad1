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

_HELD: set[Path] = set()  # the system's record locks do not keep a process from itself


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
        _HELD.add(path)
        try:
            yield
        finally:
            _HELD.discard(path)
            path.unlink(missing_ok=True)  # while it is still held: whoever comes now makes a file of their own
            os.close(descriptor)
    finally:
        _remove_empty(made)


def _acquired(path: Path, what: str) -> int:
    """The descriptor of the open lock file, which is locked."""
    while path not in _HELD:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(descriptor) and _is_still_there(path, descriptor):
            os.ftruncate(descriptor, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
            os.write(descriptor, holder.encode())
            return descriptor
        gone = not _is_still_there(path, descriptor)
        os.close(descriptor)
        if not gone:
            break
    try:
        holder = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        holder = ""
    raise OutputError(
        f"{what}: {holder or 'another process'} is writing there; wait until it has ended, or choose another place"
    )


def _lock(descriptor: int) -> bool:
    """Whether the lock was free, or the file system has none."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


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

"""Files and archives that may be anything: how much is read of them, and what they make libraries raise."""

from __future__ import annotations

import errno
import json
import lzma
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any

#: The most that is read of one file at once, unless the caller says less.
MOST_BYTES = 1 << 29
#: What zipfile and numpy raise for an archive that is damaged, encrypted, packed in a way they do not know, or says
#: sizes that no machine has.
ARCHIVE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    SyntaxError,
    TokenError,  # numpy reads the headers of arrays as Python's literals
    struct.error,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
)


def read_bounded(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file, or of one that a link leads to.

    Args:
        most: the largest size in bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, which may never end, or it is larger.
    """
    # A pipe that nobody writes to would block already when it is opened.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is a pipe or a device; expected a file")
        if found.st_size > most:
            raise ValueError(f"has {found.st_size:,} bytes; expected at most {most:,}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()  # not read(most), which takes that much memory first
    finally:
        os.close(descriptor)


def not_here(path: Path, otherwise: str = "no such file") -> str:
    """What to say of a path at which a file is expected and none is: that it is a pipe or a device, or `otherwise`."""
    special = path.exists() and not path.is_file() and not path.is_dir()
    return "is a pipe or a device, which may never end" if special else otherwise


def parse_json(text: str | bytes) -> Any:
    """`json.loads`; ValueError for anything that is not JSON, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def reason_of(error: BaseException) -> str:
    """What an error says, in one line: its first line, or its name if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]

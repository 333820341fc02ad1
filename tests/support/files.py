"""Images as files, zips that are damaged in one place, and other files as people have them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def png(grey: int = 0, size: tuple[int, int] = (4, 4), kind: str = "PNG", **options: Any) -> bytes:
    """An image file of one colour."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), grey, np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def put(path: Path, content: bytes | str = b"") -> Path:
    """Writes a file and the folders around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(folder: Path, path: Path, *, under: str = "") -> Path:
    """A zip file of a folder, as `zip -r` writes it: with entries for the folders, in another order than by name."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            name = under + file.relative_to(folder).as_posix()
            archive.writestr(f"{name}/", b"") if file.is_dir() else archive.write(file, name)
    return path


def patched(path: Path, member: str, *, local: int = 0, central: int = 0, value: bytes) -> Path:
    """Overwrites bytes in a member's two headers, at these places behind their beginnings; 0 leaves a header alone."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo(member).header_offset
    if local:
        content[at + local : at + local + len(value)] = value
    if central:
        begin = content.index(b"PK\x01\x02")
        while not content[begin + 46 :].startswith(member.encode()):
            begin = content.index(b"PK\x01\x02", begin + 4)
        content[begin + central : begin + central + len(value)] = value
    path.write_bytes(content)
    return path

"""Folders and zip files of images, which are listed and read alike. Nothing is ever extracted."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from fdistill.base.errors import DataError
from fdistill.base.reading import ARCHIVE_ERRORS, MOST_BYTES, read_bounded, reason_of
from fdistill.data.listing import LINKED_FOLDER, NO_FILE, SYSTEM, Listing, is_system, looks_like_image
from fdistill.data.names import shown
from fdistill.data.source import PerProcess

#: The most that an image file, and a caption beside an image, may have.
MOST_OF_IMAGE, MOST_OF_CAPTION = 1 << 28, 1 << 20
_PACKINGS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_ENCRYPTED = 1
_LeftOut = tuple[tuple[str, str], str]


class Tree(Protocol):
    """Files by their paths below one place."""

    name: str
    what: str  # "folder" or "zip file", for messages

    def listing(self) -> Listing:
        """What lies there; DataError if it cannot be read."""

    def read(self, file: str, most: int = MOST_OF_IMAGE) -> bytes:
        """The content of a listed file. OSError or ValueError, which says why, if it cannot be read or is larger."""

    def read_text_of(self, file: str, most: int = MOST_BYTES) -> bytes:
        """`read` for captions, labels and lists, which are shown again: one line as a DataError if it cannot be read,
        or is a link that leads out of the folder."""


class FolderTree:
    """A folder. Links to files are followed, links to folders are not: they may lead in circles and anywhere."""

    what = "folder"

    def __init__(self, root: Path):
        self.name, self.root = str(root), root

    def listing(self) -> Listing:
        """See `Tree.listing`."""
        found = Listing()
        pending = [""]
        while pending:
            below = pending.pop()
            try:
                with os.scandir(self.root / below if below else self.root) as entries:
                    pending += [folder for entry in entries if (folder := _sorted_in(found, entry, below))]
            except OSError as error:
                raise DataError(
                    f"data {shown(self.name)}: {shown(below) or 'it'} cannot be listed ({reason_of(error)}); make it "
                    "readable, or move it away"
                ) from error
        return found.finish()

    def read(self, file: str, most: int = MOST_OF_IMAGE) -> bytes:
        """See `Tree.read`."""
        return read_bounded(self.root / file, most)

    def read_text_of(self, file: str, most: int = MOST_BYTES) -> bytes:
        """See `Tree.read_text_of`."""
        path = self.root / file
        try:
            if path.is_symlink() and self.root.resolve() not in path.resolve().parents:
                raise DataError(
                    f"data {shown(self.name)}, {shown(file)}: is a link that leads out of the folder, and text from "
                    "there is not read; put the file itself in its place"
                )
            return read_bounded(path, most)
        except (OSError, ValueError) as error:
            raise _unread(self.name, file, error) from error


def _sorted_in(found: Listing, entry: os.DirEntry[str], below: str) -> str | None:
    """Files one entry of a folder; the path of one that is to be listed too."""
    name = f"{below}/{entry.name}" if below else entry.name
    if is_system(entry.name):
        found.leave_out(SYSTEM, name)
    elif _is(entry.is_dir):
        if not below:
            found.folders.append(name)
        if not entry.is_symlink():
            return name
        found.leave_out(LINKED_FOLDER, name)
    elif _is(entry.is_file):
        found.add(name)
    elif looks_like_image(name):
        found.leave_out(NO_FILE, name)
    return None


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself
        return False


class ZipTree:
    """A zip file. Where all that it holds lies in one folder, as after `zip -r x.zip photos`, that is its top.

    Raises:
        DataError: it is no zip file, or holds a member that is encrypted, is packed in an unknown way, or has the name
            of another.
    """

    what = "zip file"

    def __init__(self, path: Path):
        self.name = str(path)
        self._archive = PerProcess(partial(zipfile.ZipFile, path))
        try:
            members = self._archive.get().infolist()
        except ARCHIVE_ERRORS as error:
            raise DataError(
                f"data {shown(self.name)}: cannot be read as a zip file ({reason_of(error)}); copy or download it again"
            ) from error
        files, folders, self._left_out = self._sorted(members)
        outer = self._outer = _outer(files)
        self._members = {file[len(outer) :]: member for file, member in files.items()}
        inner = [folder[len(outer) :] for folder in folders if folder.startswith(outer)]
        inner += [file.rpartition("/")[0] for file in self._members]
        self._folders = sorted({folder.split("/")[0] for folder in inner} - {""})

    def listing(self) -> Listing:
        """See `Tree.listing`."""
        found = Listing()
        for file in self._members:
            found.add(file)
        found.folders += self._folders
        for kind, name in self._left_out:
            found.leave_out(kind, name.removeprefix(self._outer))
        return found.finish()

    def read(self, file: str, most: int = MOST_OF_IMAGE) -> bytes:
        """See `Tree.read`."""
        archive, member = self._archive.get(), self._members[file]
        try:
            size = archive.getinfo(member).file_size
            if size > most:
                raise ValueError(f"has {size:,} bytes unpacked; expected at most {most:,}")
            return archive.read(member)
        except ARCHIVE_ERRORS as error:
            raise ValueError(reason_of(error)) from error

    def read_text_of(self, file: str, most: int = MOST_BYTES) -> bytes:
        """See `Tree.read_text_of`."""
        try:
            return self.read(file, most)
        except ValueError as error:
            raise _unread(self.name, file, error) from error

    def _sorted(self, members: Iterable[zipfile.ZipInfo]) -> tuple[dict[str, str], list[str], list[_LeftOut]]:
        """({path: name of the member}, folders, what is left out)."""
        files: dict[str, str] = {}
        folders: list[str] = []
        left_out: list[_LeftOut] = []
        for member in members:
            # Names are keys: whatever they say, nothing is written. Some programs of Windows write backslashes.
            parts = [part for part in member.filename.replace("\\", "/").split("/") if part not in ("", ".", "..")]
            name = "/".join(parts)
            hidden = next((place for place, part in enumerate(parts) if is_system(part)), None)
            if hidden is not None:  # what lies below is not looked at, as in a folder
                left_out.append((SYSTEM, "/".join(parts[: hidden + 1])))
            elif member.is_dir() or not parts:
                folders.append(name)
            elif stat.S_ISLNK(member.external_attr >> 16):
                left_out.append((NO_FILE, name))
            else:
                _check_member(member, self.name)
                if name in files:
                    raise DataError(
                        f"data {shown(self.name)}: two members are called {shown(name)}; pack the files again"
                    )
                files[name] = member.filename
        return files, folders, list(dict.fromkeys(left_out))


def open_tree(path: Path) -> Tree:
    """A folder or a zip file; DataError as `ZipTree` says."""
    return FolderTree(path) if path.is_dir() else ZipTree(path)


def _check_member(member: zipfile.ZipInfo, archive: str) -> None:
    where = f"data {shown(archive)}: {shown(member.filename)}"
    if member.flag_bits & _ENCRYPTED:
        raise DataError(f"{where} is encrypted; unpack the archive with its password, and pass the folder")
    if member.compress_type not in _PACKINGS:
        raise DataError(
            f"{where} is packed by method {member.compress_type}, such as Deflate64, which Python cannot unpack; "
            "unpack the archive and pass the folder, or pack it again with Deflate"
        )


def _outer(files: Iterable[str]) -> str:
    """The folders that all files lie in, with a slash behind."""
    folders = [file.split("/")[:-1] for file in files]
    if not folders:
        return ""
    ends = zip(min(folders), max(folders), strict=False)  # what these two share, all share
    return "".join(f"{first}/" for first, _ in takewhile(lambda pair: pair[0] == pair[1], ends))


def _unread(name: str, file: str, error: Exception) -> DataError:
    return DataError(f"data {shown(name)}, {shown(file)}: cannot be read ({reason_of(error)}); copy it again")

"""What lies in a folder or a zip file, by the same rules for both: images, texts, other files, and what is left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fdistill.base.errors import DataError
from fdistill.data.names import composed, shown
from fdistill.data.source import is_image

#: Kinds of what is left out: (of one, of several).
LINKED_FOLDER = ("linked folder", "linked folders")
NO_FILE = ("link that leads nowhere, pipe or device", "links that lead nowhere, pipes or devices")
FORMAT = ("image of a format that is not read", "images of formats that are not read")
BESIDE = ("image beside the files that are read", "images beside the files that are read")
PART = ("file of another split", "files of other splits")
NO_IMAGE = ("file that is no image", "files that are no images")
SYSTEM = ("hidden or system file", "hidden or system files")
#: Those that somebody may mean to be read.
MEANT_AS_IMAGES = (LINKED_FOLDER, NO_FILE, FORMAT, BESIDE)

#: Suffixes of image formats that are not read: Pillow or other programs know them.
_OTHER_FORMATS = re.compile(
    r"tiff?|gif|apng|jfif|jfi|jif|jpe|jp2|j2k|jpf|jpx|jxl|hei[cf]|hif|avif|tga|p[pgbn]m|dib|psd|svg|ico|icns|exr|hdr|"
    r"dng|cr[23]|nef|arw|orf|rw2|raf|pcx|qoi|dcm|eps",
    re.IGNORECASE,
)
#: What Windows, macOS, NAS systems and notebooks leave behind; names are compared in lower case.
_SYSTEM = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
    | {"system volume information"}
)
_NUMBER = re.compile("[0-9]+", re.ASCII)

LeftOut = dict[tuple[str, str], list[str]]


@dataclass
class Listing:
    """Paths below a folder or within a zip file, with forward slashes; sorted as text by `finish`.

    Attributes:
        images: what is read.
        texts: .txt files, which may be captions.
        others: all other files.
        folders: names of the folders at the top, except hidden ones and the system's.
        left_out: {kind: names}.
    """

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Files a regular file by its name."""
        if is_image(name):
            self.images.append(name)
        elif name.lower().endswith(".txt"):
            self.texts.append(name)
        elif looks_like_image(name):
            self.leave_out(FORMAT, name)
        else:
            self.others.append(name)

    def leave_out(self, kind: tuple[str, str], name: str) -> None:
        """Notes what is not read."""
        self.left_out.setdefault(kind, []).append(name)

    def finish(self) -> Listing:
        """The listing, sorted."""
        for names in (self.images, self.texts, self.others, self.folders, *self.left_out.values()):
            names.sort()
        return self


def is_system(part: str) -> bool:
    """Whether a file or folder of this name is hidden (macOS writes `._x.png`) or a system's own."""
    return part.startswith(".") or part.lower() in _SYSTEM


def in_system_folder(path: str) -> bool:
    """Whether a path within an archive leads through a hidden folder, or a system's own."""
    return any(is_system(part) for part in path.split("/") if part not in (".", ".."))


def looks_like_image(name: str) -> bool:
    """Whether a name ends as those of images do, of formats that are read or not."""
    return is_image(name) or _OTHER_FORMATS.fullmatch(PurePosixPath(name).suffix[1:]) is not None


def files_at_top(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder whose names end so, in lower or upper case, sorted; without hidden and system files."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() == suffix and not is_system(p.name) and p.is_file())


def images_at_top(folder: Path) -> LeftOut:
    """{BESIDE: names} of the images in a folder of which other files are read; empty if there are none."""
    names = sorted(p.name for p in folder.iterdir() if looks_like_image(p.name) and not is_system(p.name))
    return {BESIDE: names} if names else {}


def class_order(names: list[str], where: str) -> tuple[list[str], str]:
    """(names of class folders in the order of their ids, what should be said about it).

    Numbers are in numeric order, all other names sorted as text.

    Raises:
        DataError: two folders have the same number or the same name, spelt in two ways.
    """
    seen: dict[str, str] = {}
    numbers = all(_NUMBER.fullmatch(name) for name in names)
    for name in names:
        same = (name.lstrip("0") or "0") if numbers else composed(name)
        if same in seen:
            raise DataError(
                f"data {where}: the class folders {shown(seen[same])!a} and {shown(name)!a} are one class, spelt in "
                "two ways; merge them"
            )
        seen[same] = name
    if not numbers:
        return sorted(names), ""
    ordered = sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))
    if [name.lstrip("0") or "0" for name in ordered] == [str(place) for place in range(len(names))]:
        return ordered, ""
    return ordered, (
        f"data {where}: class folders are numbered {ordered[0]} to {ordered[-1]}, which are not 0 to {len(names) - 1}; "
        f"class ids are their places, {ordered[0]} -> 0 ... {ordered[-1]} -> {len(names) - 1}. If the numbers are the "
        "teacher's class ids, list them in a dataset.json"
    )

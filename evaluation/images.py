"""Images to measure, from any place that `fdistill.data` opens: in order, each once, none skipped.

Training skips an image that cannot be read; a score may not. Images that would change a score silently (another size,
transparency, more than 8 bits a channel, a damaged file) are refused by name.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from PIL.Image import Image as PILImage
from torch import Tensor

from evaluation.preparation import (
    Preparation,
    UnusableImageError,
    decoded,
    in_threads,
    is_grey,
    is_lossy,
    is_turned,
    opened,
    prepared,
    threads_for,
)
from evaluation.stored import mapped_npz, read_manifest
from fdistill.base.errors import ArgumentError, DataError
from fdistill.base.reading import reason_of
from fdistill.data import open_source
from fdistill.data.account import Account, account_of
from fdistill.data.folder import FolderSource
from fdistill.data.names import natural_order
from fdistill.data.source import ArraySource, Source
from fdistill.data.tree import FolderTree

#: Entries of a manifest that the provenance of scores repeats.
_MANIFEST_FACTS = (
    "checkpoint",
    "checkpoint_sha256",
    "kind",
    "seed",
    "guidance",
    "negative_prompt",
    "evaluations_per_image",
    "images_per_second",
    "device",
)
_LISTED = 5
_HASHED_AT_ONCE = 64

_T = TypeVar("_T")


class Images(Protocol):
    """Images by index. Image i is the same in every batch."""

    @property
    def name(self) -> str:
        """Where they come from, for messages."""

    @property
    def labels(self) -> Tensor | None:
        """Class labels int64 [N]; None if there are none."""

    @property
    def files(self) -> Sequence[str] | None:
        """Paths of the files that the images are, below their folder or within their archive; None if they are none."""

    @property
    def account(self) -> Account | None:
        """What was read and what was left out; None for images that are made while they are read."""

    prompts: Sequence[str] | None  # of each image, or its caption; reading damaged captions raises DataError

    @property
    def facts(self) -> dict[str, Any]:
        """What the provenance of scores says about them."""

    def __len__(self) -> int:
        """Number of images, at least 1."""

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] on the CPU."""

    def sha256(self) -> str | None:
        """Hash of their content; None for images that are made while they are read."""


def open_images(
    where: str | Path,
    *,
    channels: int,
    recipe: str = "exact",
    size: int | None = None,
    max_images: int | None = None,
    in_order: bool = True,
    allow_skipped: bool = False,
) -> Images:
    """Opens images of one size. Images of a folder or zip file are in the natural order of their names, 2.png before
    10.png.

    Labels and prompts come from a folder's manifest.json, as `fdistill generate` writes it, else from the source.

    Args:
        where: anything that `fdistill.data.open_source` opens.
        channels, recipe, size: as in `Preparation`; "exact" without a size expects all images to have the size of
            the first one.
        max_images: open at most this many; None for all.
        in_order: whether these are the first ones. If not, they are drawn evenly from all, the same each time: a source
            may be sorted by class.
        allow_skipped: whether they may be opened where more than 1 % of what lies there and may be images is not read.

    Raises:
        ArgumentError: a value that is not allowed.
        DataError: there are no images, they are not uint8, too many are left out, the first one does not fit, or the
            manifest is damaged or belongs to other images. The images after the first are checked by `read` and
            `sha256`.
    """
    preparation = Preparation(channels, recipe, size)
    if max_images is not None and max_images < 1:
        raise ArgumentError(f"max_images: expected at least 1, got {max_images}")
    source: Source = mapped_npz(Path(where)) or open_source(str(where))
    if not allow_skipped:
        account_of(source).check_whole(f"images {where}")
    rows: Sequence[int] = range(len(source) if max_images is None else min(max_images, len(source)))
    if len(rows) < len(source) and not in_order:
        rows = sorted(np.random.default_rng(0).permutation(len(source))[: len(rows)].tolist())
    if isinstance(source, ArraySource):
        return _ArrayImages(source, rows, preparation)
    return _FileImages(source, rows, preparation)


def open_views(
    where: str | Path,
    views: Mapping[str, tuple[str, int | None]],
    *,
    channels: int,
    max_images: int | None = None,
    in_order: bool = True,
    allow_skipped: bool = False,
) -> dict[str, Images]:
    """`open_images` in several preparations of the same images, {name: (recipe, size)}."""
    return {
        name: open_images(
            where,
            channels=channels,
            recipe=recipe,
            size=size,
            max_images=max_images,
            in_order=in_order,
            allow_skipped=allow_skipped,
        )
        for name, (recipe, size) in views.items()
    }


class _Problem(NamedTuple):
    """An image that cannot be used, and why, as the end of a sentence that begins with its name."""

    name: str
    reason: str


class _SourceImages:
    """What images in memory and images in files share: labels, prompts, facts and preparation.

    Args:
        places: of the chosen images in the natural order of their names, or in the source if they have none.
    """

    def __init__(self, source: Source, places: Sequence[int], preparation: Preparation):
        self.name, self._source, self._preparation = source.name, source, preparation
        self.account = account_of(source)
        files: Sequence[str] | None = getattr(source, "files", None)
        order = None if files is None else natural_order(files)
        rows = self._rows = places if order is None else [order[place] for place in places]
        self.files = _rows_of(files, rows)
        manifest = read_manifest(source)
        self._prompts: Sequence[str] | None = _rows_of(manifest.get("prompts"), places)
        self._origin = {key: manifest[key] for key in _MANIFEST_FACTS if key in manifest}
        self.labels = source.labels[list(rows)] if source.num_classes is not None else None
        if manifest.get("labels") is not None:
            self.labels = torch.tensor(manifest["labels"])[list(places)]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def prompts(self) -> Sequence[str] | None:
        """As in `Images`; the source's captions are read when they are asked for, as most scores need none."""
        return _rows_of(self._source.captions, self._rows) if self._prompts is None else self._prompts

    @prompts.setter
    def prompts(self, prompts: Sequence[str] | None) -> None:
        self._prompts = prompts

    def _facts(self, lossy: int, grey: int, width: int, height: int) -> dict[str, Any]:
        return {
            **self._origin,
            "read": self.account.facts(),
            "available": len(self._source),
            "recipe": self._preparation.recipe,
            "resolution": f"{width}x{height}",
            "lossy_files": lossy,
            "greyscale_expanded": grey if self._preparation.channels == 3 else 0,
        }

    def _named(self, digest: Any) -> str:
        if self._preparation.recipe != "exact":
            digest.update(f"{self._preparation.recipe} {self._preparation.size}".encode())
        return str(digest.hexdigest())


class _ArrayImages(_SourceImages):
    """Images in memory, or in a file that is mapped into it."""

    def __init__(self, source: ArraySource, rows: Sequence[int], preparation: Preparation):
        super().__init__(source, rows, preparation)
        self._images = source.images
        self._made = self.read([0]).shape

    @property
    def facts(self) -> dict[str, Any]:
        """See `Images.facts`."""
        grey = len(self) if self._images.shape[1] == 1 else 0
        return self._facts(0, grey, self._made[3], self._made[2])

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]."""
        chosen = self._images[[self._rows[index] for index in indices]]
        return prepared(chosen, self.name, self._preparation)

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256(str([len(self), *self._images.shape[1:]]).encode())
        for row in self._rows:
            digest.update(self._images[row].contiguous().numpy().tobytes())
        return self._named(digest)

    def sha256(self) -> str:
        """Hash of shape and pixels, and of the recipe if it resizes."""
        return self._sha256


class _FileImages(_SourceImages):
    """Encoded images: files, members of archives, rows of data sets. `facts` count images read or hashed so far."""

    def __init__(self, source: Source, rows: Sequence[int], preparation: Preparation):
        super().__init__(source, rows, preparation)
        recipe, size = preparation.recipe, preparation.size
        self._lossy: set[int] = set()
        self._grey: set[int] = set()
        self._turned: set[int] = set()
        self._threads = 1
        # An archive has one position in its file, so that its members must be read one after another.
        self._turn: AbstractContextManager[Any] = nullcontext() if _is_folder(source) else Lock()
        self._only = (size, size) if recipe == "exact" and size is not None else None
        ((_, first),) = self._usable(self._open, [0])
        self._made = first.size if size is None else (size, size)
        self._threads = threads_for(*first.size)
        if recipe == "exact":
            self._only = self._made

    @property
    def facts(self) -> dict[str, Any]:
        """See `Images.facts`."""
        turned = {"turned_by_camera": len(self._turned)} if self._turned else {}
        return self._facts(len(self._lossy), len(self._grey), *self._made) | turned

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W].

        Raises:
            DataError: images are damaged, or of another size or kind than asked for; it names them.
        """
        width, height = self._made
        made = np.empty((len(indices), self._preparation.channels, height, width), np.uint8)
        return torch.from_numpy(np.stack(self._usable(self._pixels, indices), out=made))

    def sha256(self) -> str:
        """Hash of the files' bytes in their order, and of the recipe if it resizes; not of the files' names.

        It reads every image's header too, so that images that do not fit are found before anything is computed.

        Raises:
            DataError: as `read`, except for damage behind the header.
        """
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        problems: list[_Problem] = []
        for first in range(0, len(self), _HASHED_AT_ONCE):
            block = range(first, min(first + _HASHED_AT_ONCE, len(self)))
            for result in in_threads(self._attempt(self._open), block, self._threads):
                if isinstance(result, _Problem):
                    problems.append(result)
                    continue
                digest.update(len(result[0]).to_bytes(8, "little"))
                digest.update(result[0])
        self._refuse(problems)
        return self._named(digest)

    def _usable(self, work: Callable[[int], _T], indices: Sequence[int]) -> list[_T]:
        results = in_threads(self._attempt(work), indices, self._threads)
        self._refuse([result for result in results if isinstance(result, _Problem)])
        return [result for result in results if not isinstance(result, _Problem)]

    def _attempt(self, work: Callable[[int], _T]) -> Callable[[int], _T | _Problem]:
        """A function that returns what `work` returns, or what is wrong with the image."""

        def attempt(index: int) -> _T | _Problem:
            try:
                return work(index)
            except UnusableImageError as error:
                return _Problem(self._source.item_name(self._rows[index]), str(error))

        return attempt

    def _refuse(self, problems: Sequence[_Problem]) -> None:
        """Raises DataError if there are problems; with those of all other images."""
        if problems:
            whole = in_threads(self._attempt(self._is_whole), range(len(self)), self._threads)
            problems = [result for result in whole if isinstance(result, _Problem)] or problems
            raise DataError(f"images {self.name}: {_listed(problems)}")

    def _open(self, index: int) -> tuple[bytes, PILImage]:
        """The file's bytes, and the image before it is decoded."""
        try:
            with self._turn:
                encoded = self._source.encoded(self._rows[index])
        except (OSError, ValueError) as error:
            raise UnusableImageError(f"cannot be read ({reason_of(error)}); copy or download it again") from error
        if not isinstance(encoded, bytes):
            encoded = _file_of(encoded)
        image = opened(encoded, self._preparation.channels, self._only)
        if is_lossy(encoded, image):
            self._lossy.add(index)
        if is_grey(image):
            self._grey.add(index)
        if is_turned(image):
            self._turned.add(index)
        return encoded, image

    def _is_whole(self, index: int) -> bool:
        self._pixels(index)
        return True

    def _pixels(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return decoded(self._open(index)[1], self._preparation)


def _listed(problems: Sequence[_Problem]) -> str:
    """What is wrong with images, each reason once with the names of the first images that it is true of."""
    names: dict[str, list[str]] = {}
    for name, reason in problems:
        names.setdefault(reason, []).append(name)
    sentences = []
    for reason, (first, *others) in list(names.items())[:_LISTED]:
        more = f" and {len(others) - _LISTED:,} more" if len(others) > _LISTED else ""
        likewise = f"; likewise {', '.join(others[:_LISTED])}{more}" if others else ""
        sentences.append(f"{first} {reason}{likewise}")
    rest = f"; and {len(names) - _LISTED:,} other problems" if len(names) > _LISTED else ""
    return "; ".join(sentences) + rest


def _file_of(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """A file of pixels [H, W, C] or [H, W]: BMP, whose bytes are the same by every version of PIL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="BMP")
    return file.getvalue()


def _is_folder(source: Source) -> bool:
    return isinstance(source, FolderSource) and isinstance(source.tree, FolderTree)


def _rows_of(texts: Sequence[str] | None, rows: Sequence[int]) -> Sequence[str] | None:
    return None if texts is None else [texts[row] for row in rows]

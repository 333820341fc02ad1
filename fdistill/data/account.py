"""One account of what was read: how many images, in which classes, and what was left out and why."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tqdm import tqdm

from fdistill.base import rng
from fdistill.base.errors import DataError
from fdistill.data.listing import FORMAT, LINKED_FOLDER, MEANT_AS_IMAGES, LeftOut
from fdistill.data.names import shown
from fdistill.data.source import Source

#: The share of images that a score may be without.
_MOST_LEFT_OUT = 0.01
_LISTED = 20


@dataclass(frozen=True)
class Account:
    """What was read of a data set.

    Attributes:
        images: how many.
        num_classes: None for images without labels.
        classes: names of the classes 0, 1, ...; None where they have none.
        left_out: {kind: names}, the kinds as in `fdistill.data.listing`.
        captions: how many different ones the images have; None where they have none, or nothing reads them.
    """

    images: int
    num_classes: int | None = None
    classes: Sequence[str] | None = None
    left_out: LeftOut = field(default_factory=dict)
    captions: int | None = None

    def sentence(self) -> str:
        """One line, as "1,797 images in 10 classes (0 -> 0 ... 9 -> 9); left out: 3 linked folders"."""
        line = f"{self.images:,} {'image' if self.images == 1 else 'images'}"
        if self.num_classes is not None:
            line += f" in {self.num_classes:,} {'class' if self.num_classes == 1 else 'classes'}"
        if self.classes:
            ends = [f"{shown(self.classes[place])} -> {place}" for place in (0, len(self.classes) - 1)]
            line += f" ({' ... '.join(dict.fromkeys(ends))})"
        if self.captions is not None:
            line += f", with a caption for each ({self.captions:,} different)"
        parts = [_counted(kind, names) for kind, names in self.left_out.items()]
        return line + (f"; left out: {', '.join(parts)}" if parts else "")

    def facts(self) -> dict[str, Any]:
        """The same for a JSON file, with the sentence as "summary". Of many names that are left out, the first."""
        return {
            "summary": self.sentence(),
            "images": self.images,
            "num_classes": self.num_classes,
            **({} if self.captions is None else {"different_captions": self.captions}),
            **({} if self.classes is None else {"classes": [shown(name) for name in self.classes]}),
            "left_out": {
                kind[1]: {"count": len(names), "names": [shown(name) for name in names[:_LISTED]]}
                for kind, names in self.left_out.items()
            },
        }

    def check_whole(self, what: str) -> None:
        """Checks that a score of these images is one of nearly all that lie there.

        Args:
            what: what messages call the images.

        Raises:
            DataError: more than 1 % of what looks like images is left out, or a linked folder, whatever is in it.
        """
        missing = sum(len(self.left_out.get(kind, [])) for kind in MEANT_AS_IMAGES)
        if LINKED_FOLDER in self.left_out or missing > _MOST_LEFT_OUT * (self.images + missing):
            raise DataError(
                f"{what}: {self.sentence()}; a score of these would leave out more than 1 % of the images, or "
                "a whole linked folder. Copy them, convert them to .png or move them away; or pass --allow-skipped "
                "(to evaluate, compare or reference; for distill set eval.allow_skipped=true) to score the rest"
            )


def account_of(source: Source, *, captioned: bool = False) -> Account:
    """The account of a data set. A source may have `left_out`, {kind: names}, and `class_names`; it need not.

    Args:
        captioned: whether its captions are read; DataError as `Source.captions` says.
    """
    left_out: Mapping[tuple[str, str], Sequence[str]] = getattr(source, "left_out", {})
    kept = {kind: list(names) for kind, names in left_out.items() if names}
    captions = source.captions if captioned else None
    different = None if captions is None else len(set(captions))
    return Account(len(source), source.num_classes, getattr(source, "class_names", None), kept, different)


def say(what: str, sentence: str) -> None:
    """Prints one line about what was read, on the main process alone; standard output is for results."""
    if rng.world()[0] == 0:
        tqdm.write(f"{what}: {sentence}", file=sys.stderr)


def _counted(kind: tuple[str, str], names: Sequence[str]) -> str:
    """ "2 files that are no images (README.md, notes.html)"; of images of other formats the suffixes."""
    listed = sorted({PurePosixPath(name).suffix.lower() for name in names}) if kind == FORMAT else list(names)
    some = ", ".join(shown(name) for name in listed[:3]) + (", ..." if len(listed) > 3 else "")
    return f"{len(names):,} {kind[len(names) != 1]} ({some})"

"""Which prompt belongs to which image, where the prompts stand in a list: by the names of files, or by their order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath

from evaluation.images import Images
from fdistill.base.errors import ArgumentError
from fdistill.data.names import composed, shown
from fdistill.data.prompts import PromptList


def prompts_of(images: Images, listed: PromptList) -> list[str]:
    """The prompt of each image.

    Raises:
        ArgumentError: there are fewer prompts than images, an image has none or two, or the images were made from
            others.
    """
    own = images.prompts
    if listed.files is not None and images.files is not None:
        prompts = _by_name(images, images.files, listed.files, listed.prompts)
    else:
        prompts = in_turn(listed.prompts, len(images))
        if own is None:
            _check_order(images, listed)
    if own is not None and list(own) != prompts:
        raise ArgumentError(
            f"prompts: the images of {images.name} were not generated from this list; leave it out, or generate the "
            "images anew"
        )
    return prompts


def in_turn(prompts: Sequence[str], count: int) -> list[str]:
    """A prompt for each of `count` images, from the beginning again if there are fewer."""
    return [prompts[i % len(prompts)] for i in range(count)]


def _by_name(images: Images, files: Sequence[str], names: Sequence[str], prompts: Sequence[str]) -> list[str]:
    found: dict[str, str] = {}
    for name, prompt in zip(names, prompts, strict=True):
        name = composed(PurePosixPath(name).as_posix())
        if name in found:
            raise ArgumentError(f"prompts: {shown(name)} has two; expected one for each image")
        found[name] = prompt
    missing = [file for file in files if composed(file) not in found]
    if missing:
        raise ArgumentError(
            f"prompts: no line has file_name {shown(missing[0])!r}, and {len(missing)} of {len(files)} images of "
            f"{images.name} have no prompt; add a line for each of them. If the lines are in the order of the images, "
            "remove file_name from every line instead"
        )
    return [found[composed(file)] for file in files]


def _check_order(images: Images, listed: PromptList) -> None:
    """Checks that a list without names of files can go with the images by their order."""
    if len(listed.prompts) < len(images):
        raise ArgumentError(
            f"prompts: {len(listed.prompts)} in the list for {len(images)} images; expected one for each, in order"
        )
    if images.files is not None and list(images.files) != sorted(images.files):
        place = next(
            i for i, pair in enumerate(zip(images.files, sorted(images.files), strict=True)) if len(set(pair)) > 1
        )
        warnings.warn(
            f"prompts: the images of {images.name} are taken in the order of their numbers, so prompt {place + 1} goes "
            f"with {shown(images.files[place])}, where by the order of letters it would go with "
            f"{shown(sorted(images.files)[place])}; to be sure, write a .jsonl file with file_name in each line",
            stacklevel=4,
        )

"""The licence of what a student was made of, as its publisher's model card or LICENSE file says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdistill.adapters.hub import id_and_revision, is_hub_id
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import ArgumentError
from fdistill.base.reading import read_bounded
from fdistill.sharing.private import located

#: How a licence's text begins -> its identifier on the hub.
_TITLES = {
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "creativeml open rail-m": "creativeml-openrail-m",
    "creativeml open rail++-m license": "openrail++",
}
_NAMES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")


@dataclass(frozen=True)
class Licence:
    """A licence, and where it was found.

    Attributes:
        metadata: "license", and "license_name" and "license_link" where a card has them.
        source: what says so, for people.
    """

    metadata: dict[str, str]
    source: str

    def __str__(self) -> str:
        return self.metadata.get("license_name", self.metadata["license"])


def licence_for(origins: Sequence[str], near: Path, given: str | None) -> tuple[Licence, list[str]]:
    """The licence to publish a student under, and sentences that the user should read.

    Args:
        origins: names of the checkpoints that the student was made of.
        near: the student's folder.
        given: the identifier that the user has chosen, if any.

    Raises:
        ArgumentError: none is given, and the origins say none or several.
    """
    if given is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", given):
        raise ArgumentError(f"license: got {given!r}; expected an identifier of the hub, such as apache-2.0 or other")
    found = {name: licence for name in origins if (licence := licence_of(name, near)) is not None}
    if given is not None:
        others = [
            f"{Path(name).name}'s licence is {licence} ({licence.source}), and the card will say {given}: check that "
            "this is allowed"
            for name, licence in found.items()
            if licence.metadata["license"] != given.lower()
        ]
        return Licence({"license": given.lower()}, "as its publisher says"), others
    silent = [name for name in origins if name not in found]
    if found and not silent and len({str(licence) for licence in found.values()}) == 1:
        return next(iter(found.values())), []
    said = [f"{name} is under {licence}" for name, licence in found.items()]
    said += [f"{name} has no model card or LICENSE here that says one" for name in silent]
    raise ArgumentError(
        f"license: {'; '.join(said) or 'nothing says what this student was made of'}. Without one nobody may use what "
        "is published; find out what its teacher's licence asks for, and pass --license IDENTIFIER, such as apache-2.0"
    )


def licence_of(name: str, near: Path) -> Licence | None:
    """The licence of a checkpoint: an embedded teacher's, a folder's or that of a hub id; None if nothing says it."""
    folder = EMBEDDED_TEACHERS.get(name) or located(name, near)
    if folder is not None:
        return _of_folder(folder) if folder.is_dir() else None
    return _of_hub(id_and_revision(name)[0]) if is_hub_id(name) else None


def _of_folder(folder: Path) -> Licence | None:
    card = _of_card(folder / "README.md", f"README.md of {folder.name}")
    if card is not None and "://" not in card.metadata.get("license_link", "://"):
        del card.metadata["license_link"]  # a file that stays in the teacher's folder
    return card or next((found for name in _NAMES if (found := _of_text(folder / name)) is not None), None)


def _of_hub(hub_id: str) -> Licence | None:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(hub_id, "README.md", etag_timeout=5)
    except Exception:  # of the HTTP library, which differs between versions of the hub's; the user is asked instead
        return None
    found = _of_card(Path(path), f"model card of {hub_id}")
    link = None if found is None else found.metadata.get("license_link")
    if found is not None and link and "://" not in link:
        found.metadata["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return found


def _of_card(path: Path, source: str) -> Licence | None:
    from huggingface_hub import metadata_load

    try:
        metadata: Any = metadata_load(path) or {}
    except Exception:  # of the YAML library; a card that cannot be read says nothing
        return None
    value = metadata.get("license")
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str) or not value:
        return None
    more = {key: str(metadata[key]) for key in ("license_name", "license_link") if metadata.get(key)}
    return Licence({"license": value.lower(), **more}, source)


def _of_text(path: Path) -> Licence | None:
    try:
        text = read_bounded(path, 1 << 20).decode(errors="replace")
    except (OSError, ValueError):
        return None
    start = " ".join(text[:400].lower().replace(",", " ").split())
    known = next((identifier for title, identifier in _TITLES.items() if start.startswith(title)), None)
    return None if known is None else Licence({"license": known}, f"{path.name} of {path.parent.name}")

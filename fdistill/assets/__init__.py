"""Data and teachers that come with the package; each folder has a card with source, licence and how it was made."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent

DIGITS_DATA = _ROOT / "digits" / "digits.npz"
DIGITS_FEATURES = _ROOT / "digits-features"

#: Teachers that `teacher=NAME` finds without a path.
EMBEDDED_TEACHERS = {
    "digits": _ROOT / "digits-teacher",
    "digits-t2i": _ROOT / "digits-t2i",
    "digit-pairs": _ROOT / "digit-pairs",
}

#: A small open_clip model that judges how well captions fit digits: scores named `clip_digits`.
CLIP_DIGITS = _ROOT / "clip-digits"

"""Checks of features that every metric makes first. Features are rows, one for each image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_rows"]

_CHUNK = 8192  # rows checked at once, so that no copy of all of them is made


def check_rows(rows: Tensor, name: str = "rows", *, more_than: int = 0, why: str = "") -> None:
    """Raises ArgumentError unless rows are floating-point [N, D], finite, and N > more_than.

    Args:
        name: what the message calls the rows.
        why: the reason for `more_than`, for the message.
    """
    if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise ArgumentError(
            f"{name}: expected a floating-point tensor [N, D] with a row of features for each image, "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    if len(rows) <= more_than:
        reason = f", as {why}" if why else ""
        raise ArgumentError(f"{name}: expected more than {more_than} rows{reason}; got {len(rows)}: give more images")
    for first in range(0, len(rows), _CHUNK):
        check_finite(rows[first : first + _CHUNK], name, first)


def check_finite(rows: Tensor, name: str, first: int = 0) -> None:
    """Raises ArgumentError that names the first row with NaN or infinity; `first` is the number of rows[0]."""
    broken = (~rows.isfinite().all(dim=1)).nonzero()
    if len(broken):
        row = int(broken[0])
        raise ArgumentError(
            f"{name}: row {first + row} has NaN or infinite features ({len(broken)} such of {len(rows)} looked at); "
            "expected finite numbers: look at that image and at the extractor's weights"
        )


def check_pair(
    rows: Tensor,
    others: Tensor,
    names: tuple[str, str] = ("rows", "reference rows"),
    *,
    more_than: int = 0,
    why: str = "",
) -> None:
    """`check_rows` of both sets, which must also have the same number of features."""
    for values, name in zip((rows, others), names, strict=True):
        check_rows(values, name, more_than=more_than, why=why)
    if rows.shape[1] != others.shape[1]:
        raise ArgumentError(
            f"{names[0]}, {names[1]}: expected the same number of features, got {rows.shape[1]} and "
            f"{others.shape[1]}; extract both with the same network"
        )


def check_prompts(image_features: Tensor, text_features: Tensor) -> None:
    """Raises ArgumentError unless both are finite rows [N, D] of equal length and width, one prompt for each image."""
    check_pair(image_features, text_features, ("image_features", "text_features"))
    if len(image_features) != len(text_features):
        raise ArgumentError(
            f"image_features, text_features: expected one prompt for each image, got {len(image_features)} images and "
            f"{len(text_features)} prompts"
        )

"""Sample grids as text for a page: small enough together, sharp where they are small."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fdistill.base.errors import CheckpointError

#: Bytes that all pictures of a report may have as base64; with Plotly's script it stays below 10 MB.
BUDGET = 4_000_000
_WIDEST, _NARROWEST = 1200, 300


def encoded(paths: Sequence[Path], budget: int = BUDGET) -> list[str]:
    """The pictures as data URIs whose sizes together fit the budget.

    They are PNG as they are if that is small enough; otherwise WebP, smaller in steps until they fit.

    Raises:
        CheckpointError: a file is no picture.
    """
    whole = [path.read_bytes() for path in paths]
    opened = [_opened(path, content) for path, content in zip(paths, whole, strict=True)]
    if all(picture.width <= _WIDEST for picture in opened) and 4 * sum(map(len, whole)) <= 3 * budget:
        return [_uri("png", content) for content in whole]
    width = min(_WIDEST, max((picture.width for picture in opened), default=_WIDEST))
    while True:
        made = [_uri("webp", _webp(picture, width)) for picture in opened]
        if sum(map(len, made)) <= budget or width <= _NARROWEST:
            return made
        width = max(_NARROWEST, int(width / 1.4))


def _opened(path: Path, content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise CheckpointError(f"{path}: is no picture ({error}); remove it, or copy the run again") from error


def _webp(picture: Image.Image, width: int) -> bytes:
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=85)
    return stream.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

"""Images as bytes and as network values: the one place where [0, 255] meets [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fdistill.base.files import atomic_file

__all__ = ["grid", "to_pil", "to_uint8", "to_unit"]


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x0: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], clipped first, rounded to nearest."""
    return (x0.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


_GRID_WIDTH = 800


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] with 1 or 3 channels -> a PIL image."""
    array = rearrange(image.cpu().numpy(), "c h w -> h w c")
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def grid(images: Tensor, columns: int = 10) -> Image.Image:
    """images uint8 [N, C, H, W] -> one picture, row by row; small images are enlarged by a whole factor and framed."""
    columns = min(columns, max(1, 2 * _GRID_WIDTH // images.shape[3]))
    rows = -(-len(images) // columns)
    scale = max(1, _GRID_WIDTH // (columns * (images.shape[3] + 1)))
    cells = np.repeat(np.repeat(images.cpu().numpy(), scale, axis=2), scale, axis=3)
    cells = np.pad(cells, ((0, rows * columns - len(images)), (0, 0), (1, 1), (1, 1)), constant_values=128)
    cells = rearrange(cells, "(r k) c h w -> (r h) (k w) c", r=rows)
    return Image.fromarray(cells[..., 0] if cells.shape[2] == 1 else cells)


def save_grid(images: Tensor, path: Path) -> None:
    """`grid` as a PNG file."""
    with atomic_file(path) as temporary:
        grid(images).save(temporary, format="PNG")


def save_side_by_side(panels: Sequence[tuple[str, Path]], path: Path) -> None:
    """Titled greyscale or RGB pictures beside one another in one PNG, pixel for pixel."""
    title_height, gap = 40, 20
    pictures = [Image.open(picture).convert("RGB") for _, picture in panels]
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, title_height + max(picture.height for picture in pictures)), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for (title, _), picture in zip(panels, pictures, strict=True):
        middle = (left + picture.width // 2, title_height // 2)
        draw.text(middle, title, fill="black", font=ImageFont.load_default(20), anchor="mm")
        canvas.paste(picture, (left, title_height))
        left += picture.width + gap
    with atomic_file(path) as temporary:
        canvas.save(temporary, format="PNG")

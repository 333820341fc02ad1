"""Image folders as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fdistill.errors import ArgumentError
from fdistill.files import read_json_object

MANIFEST = "manifest.json"


def read_images(folder: Path) -> Tensor:
    """The PNG files of a folder in the order of their names: uint8 [N, C, H, W] with C = 1 (greyscale) or 3.

    Raises:
        ArgumentError: no PNG in it, an unreadable one, or images of different sizes or modes.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ArgumentError(f"samples {folder}: no .png files in it; expected a folder that `fdistill generate` wrote")
    arrays: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode not in ("L", "RGB"):
                    raise ArgumentError(f"{path}: mode {image.mode}; expected 8-bit greyscale or RGB")
                array = np.asarray(image)
        except (OSError, UnidentifiedImageError) as error:
            raise ArgumentError(f"{path}: cannot be read as an image ({error})") from error
        arrays.append(array if array.ndim == 3 else array[..., None])
        if arrays[-1].shape != arrays[0].shape:
            raise ArgumentError(
                f"{path}: {arrays[-1].shape} (H, W, C), but {paths[0].name} is {arrays[0].shape}; expected one size"
            )
    return torch.from_numpy(rearrange(np.stack(arrays), "n h w c -> n c h w").copy())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `fdistill generate` wrote about the folder's images; empty if there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ArgumentError(f"{path}: {error}; generate the samples again") from error

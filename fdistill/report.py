"""Pictures of a run: sample grids and curves, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from fdistill.files import atomic_file

_GRID_WIDTH = 800


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] with 1 or 3 channels -> a PIL image."""
    array = rearrange(image.cpu().numpy(), "c h w -> h w c")
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """images uint8 [N, C, H, W] -> one PNG, row by row; small images are enlarged by a whole factor and framed."""
    rows = -(-len(images) // columns)
    scale = max(1, _GRID_WIDTH // (columns * (images.shape[3] + 1)))
    cells = np.repeat(np.repeat(images.cpu().numpy(), scale, axis=2), scale, axis=3)
    cells = np.pad(cells, ((0, rows * columns - len(images)), (0, 0), (1, 1), (1, 1)), constant_values=128)
    grid = rearrange(cells, "(r k) c h w -> (r h) (k w) c", r=rows)
    with atomic_file(path) as temporary:
        Image.fromarray(grid[..., 0] if grid.shape[2] == 1 else grid).save(temporary, format="PNG")


def save_side_by_side(panels: Sequence[tuple[str, Path]], path: Path) -> None:
    """Titled pictures beside one another in one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 5.6), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(np.asarray(Image.open(picture)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=12)
        axes.axis("off")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("student", ("generator/matching", "generator/gan")),
    ("critic", ("fake_score/denoising", "discriminator/gan_real", "discriminator/gan_fake")),
    ("gradient norms before clipping", ("generator/grad_norm", "fake_score/grad_norm", "discriminator/grad_norm")),
    ("h(r)", ("generator/h_min", "generator/h", "generator/h_max")),
    ("discriminator accuracy, clamped ratios", ("discriminator/accuracy", "generator/clamped_ratios")),
)


def save_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Curves over iterations of everything a run logs, and the discriminator's accuracy per noise bin, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = figure.subplots(2, 3).flat
    iterations = [record["iteration"] for record in records]
    for axes, (title, names) in zip(panels, _PANELS, strict=False):
        for name in names:
            if any(name in record for record in records):
                label = (
                    name.removeprefix("generator/")
                    .replace("fake_score/", "fake score ")
                    .replace("/", " ")
                    .replace("_", " ")
                )
                axes.plot(iterations, [record.get(name, np.nan) for record in records], label=label)
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.legend(fontsize=8)
        if title.startswith("discriminator"):
            axes.set_ylim(0, 1)
        else:
            axes.set_yscale("log")
    rows = [record.get("discriminator/accuracy_per_bin") for record in records]
    last = figure.axes[5]
    if any(rows):
        table = np.array([[np.nan if v is None else v for v in row] for row in rows if row], dtype=float).T
        shown = last.imshow(
            table, aspect="auto", origin="lower", vmin=0.5, vmax=1, extent=(0, iterations[-1], 0, len(table))
        )
        figure.colorbar(shown, ax=last)
    last.set_title("discriminator accuracy per noise bin (low to high)")
    last.set_xlabel("iteration")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)

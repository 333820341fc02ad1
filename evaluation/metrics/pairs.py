"""A picture of samples beside the teacher's images of the same prompts: the best, the median and the worst by score."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import Tensor

_SIDE, _GAP, _LINE, _FONT = 384, 8, 18, 14  # pixels
_LINES = 2  # of a prompt
_CHARACTERS = 90  # in a line


def pairs_picture(scores: Tensor, measured: Measured) -> PILImage | None:
    """A row for each of the three: its score and prompt, and below them the teacher's image (left) and the sample.

    Image i of both sides comes from the same noise if both were made with the same seed.

    Args:
        scores: [N], one for each sample.

    Returns:
        The picture; None if there is no reference, or if it has not the samples' prompts in their order.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    from fdistill.base.images import to_pil

    images, teacher = measured.images, measured.reference_images
    prompts = images.prompts
    if teacher is None or prompts is None or teacher.prompts is None or list(teacher.prompts) != list(prompts):
        return None
    order = scores.argsort(stable=True).tolist()
    shown = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    text = (1 + _LINES) * _LINE
    height = text + _SIDE + _GAP
    canvas = Image.new("RGB", (2 * _SIDE + _GAP, len(shown) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT)
    for row, (name, index) in enumerate(shown.items()):
        lines = [f"{name}: {scores[index]:.4g} (image {index}; left: teacher)"]
        lines += textwrap.wrap(prompts[index], _CHARACTERS, max_lines=_LINES, placeholder=" ...")
        for number, line in enumerate(lines):
            draw.text((0, row * height + number * _LINE), line, fill="black", font=font)
        for column, side in enumerate((teacher, images)):
            picture = ImageOps.contain(to_pil(side.read([index])[0]), (_SIDE, _SIDE), Image.Resampling.LANCZOS)
            canvas.paste(picture, (column * (_SIDE + _GAP), row * height + text))
    return canvas

"""How images look, in four numbers: what drifts in a student, compared with its teacher, before scores say so.

Strong guidance in a few steps burns colours and contrast (Decoupled DMD, arXiv 2511.22677); reverse KL makes images of
one class or prompt alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

#: What these numbers' names begin with in records, "samples/contrast" and "samples/teacher_contrast".
LOOK = "samples/"


def appearance(images: Tensor, groups: Sequence[Hashable]) -> dict[str, float]:
    """Means over images.

    - brightness: of all pixels, 0 black to 1 white.
    - contrast: standard deviation of an image's grey values, at most 0.5.
    - saturation: the largest minus the smallest of a pixel's three channels, 0 grey to 1; not for greyscale images.
    - diversity: root mean square difference of two images of the same group, of all pairs; only where a group has two.

    Args:
        images: uint8 [N, C, H, W], C 1 or 3.
        groups: the class or prompt of each image.
    """
    values = images.double() / 255
    grey = values.mean(1).flatten(1)
    found = {"brightness": grey.mean(), "contrast": grey.std(1, correction=0).mean()}
    if images.shape[1] == 3:
        found["saturation"] = (values.amax(1) - values.amin(1)).mean()
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    pairs = [torch.pdist(values[own].flatten(1)) / values[0].numel() ** 0.5 for own in rows.values()]
    if any(len(each) for each in pairs):
        found["diversity"] = torch.cat(pairs).mean()
    return {name: float(value) for name, value in found.items()}

"""What everything that makes images has in common: what it is told, what it costs, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.base.errors import NonFiniteError
from fdistill.base.images import to_uint8

#: What images are asked to be: labels int64 [N], N prompts, or nothing.
Told = Tensor | Sequence[str] | None


@dataclass
class Evaluations:
    """Network evaluations, and the images they were spent on, as counted while it ran."""

    network: int = 0
    images: int = 0

    @property
    def per_image(self) -> float:
        return self.network / max(1, self.images)


def finite_uint8(x0: Tensor, indices: Sequence[int], name: str) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] as uint8 on the CPU, rounded to nearest.

    Raises:
        NonFiniteError: one of them is not finite; `indices` are their numbers, `name` is what made them.
    """
    finite = torch.isfinite(x0).flatten(1).all(dim=1).tolist()
    if not all(finite):
        raise NonFiniteError(
            f"{name}: image {indices[finite.index(False)]} has values that are NaN or infinite; "
            "look at the checkpoint with `fdistill inspect`, and try a lower guidance scale"
        )
    return to_uint8(x0).cpu()

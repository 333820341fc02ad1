"""How far two computations of the same numbers may differ."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_rounded(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Every value may differ by `share` of the largest expected one: what rounding leaves of sums in another order."""
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=share * scale)

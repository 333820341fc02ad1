"""Mean and covariance of features in float64, from batches and processes in any order."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.metrics.rows import check_finite
from fdistill.base import rng
from fdistill.base.distributed import sum_over_processes
from fdistill.base.errors import ArgumentError

__all__ = ["Moments"]

_CHUNK = 4096  # rows in float64 at a time


class Moments:
    """Running mean and covariance of [N, D] features, by merging centred batches (Chan, Golub and LeVeque 1983).

    Batches are centred on their own means, so a large common offset of the features costs no precision. Memory is
    O(D^2).

    Attributes:
        count: number of rows so far; None for published statistics that do not say.
        mean: float64 [D]; zeros before the first row.
    """

    def __init__(self, width: int):
        self.count: int | None = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, rows: Tensor, counts: Tensor | None = None) -> Moments:
        """Moments of rows [N, D]; see `update`."""
        if rows.ndim != 2:
            raise ArgumentError(f"rows: expected [N, D], a row of features for each image, got {list(rows.shape)}")
        moments = cls(rows.shape[1])
        moments.update(rows, counts)
        return moments

    @classmethod
    def known(cls, mean: Tensor, covariance: Tensor, count: int | None = None) -> Moments:
        """Moments from published statistics.

        Args:
            mean: [D].
            covariance: [D, D], unbiased.
            count: number of images behind them; None if not known.

        Raises:
            ArgumentError: the shapes do not fit, numbers are not finite, or count < 2.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ArgumentError(
                f"mean, covariance: expected [D] and [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ArgumentError("mean, covariance: contain NaN or infinity; expected finite numbers")
        if count is not None and count < 2:
            raise ArgumentError(f"count: expected at least 2 images behind a covariance, got {count}")
        moments = cls(len(mean))
        moments.count = count
        moments.mean = mean.detach().to("cpu", torch.float64, copy=True)
        moments._scatter = covariance.detach().to("cpu", torch.float64, copy=True)
        if count is not None:
            moments._scatter *= count - 1
        return moments

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (divided by N - 1), float64 [D, D]; raises ArgumentError for fewer than two rows."""
        if self.count is None:
            return self._scatter.clone()
        if self.count < 2:
            raise ArgumentError(f"covariance: expected at least 2 rows, got {self.count}; give more images")
        return self._scatter / (self.count - 1)

    def update(self, rows: Tensor, counts: Tensor | None = None) -> None:
        """Adds rows [B, D] of any floating-point dtype, computed in float64; B may be 0.

        Args:
            counts: int64 [B], how many times each row counts; once each by default.

        Raises:
            ArgumentError: another number of features, or a row that is not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width or not rows.is_floating_point():
            raise ArgumentError(
                f"rows: expected floating-point [B, {self.width}], got {rows.dtype} {list(rows.shape)}; "
                "one Moments takes the features of one network"
            )
        for first in range(0, len(rows), _CHUNK):
            here = slice(first, first + _CHUNK)
            self._update(rows[here].detach().to("cpu", torch.float64), None if counts is None else counts[here])

    def _update(self, rows: Tensor, counts: Tensor | None) -> None:
        before = self._counted()
        if counts is None:
            number, mean = len(rows), rows.mean(0)
        else:
            rows, counts = rows[counts > 0], counts[counts > 0].double()
            number = round(counts.sum().item())
            mean = counts @ rows / number if number else self.mean
        if not number:
            return
        if not mean.isfinite().all():
            check_finite(rows, "rows", before)
        centred, shift = rows - mean, mean - self.mean
        if counts is not None:
            centred *= counts.sqrt()[:, None]
        # The distance of the two means enters as one more row, through the same matrix product.
        centred = torch.cat([centred, shift[None] * math.sqrt(before * number / (before + number))])
        self._scatter.addmm_(centred.T, centred)
        self.mean += shift * (number / (before + number))
        self.count = before + number

    def merge(self, other: Moments) -> None:
        """Adds the rows behind other moments, which do not change.

        Raises:
            ArgumentError: another number of features, or the number of rows of either is not known.
        """
        if other.width != self.width:
            raise ArgumentError(f"moments: expected {self.width} features as in these, got {other.width}")
        before, number = self._counted(), other._counted()
        if not number:
            return
        shift = other.mean - self.mean
        self._scatter += other._scatter
        self._scatter.addr_(shift, shift, alpha=before * number / (before + number))
        self.mean += shift * (number / (before + number))
        self.count = before + number

    def over_processes(self) -> Moments:
        """Moments of the rows of all processes, equal bit by bit on all of them; every process must call it."""
        _, processes = rng.world()
        if processes == 1:
            return self
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")

        def total(value: Tensor) -> Tensor:
            return sum_over_processes(value.to(device)).cpu()

        mine, result = self._counted(), Moments(self.width)
        result.count = round(total(torch.tensor([mine], dtype=torch.float64)).item())
        # The mean of means first: scatter around it is then a plain sum.
        result.mean = total(self.mean * mine) / max(result.count, 1)
        shift = self.mean - result.mean
        result._scatter = total(self._scatter.addr(shift, shift, alpha=mine))
        return result

    def _counted(self) -> int:
        if self.count is None:
            raise ArgumentError(
                "moments: published statistics of an unknown number of images cannot be added to; "
                "start from Moments(width), or give their count"
            )
        return self.count

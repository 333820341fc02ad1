"""Learning rates. They are functions of the iteration, so that a resumed run needs no state of them."""

from __future__ import annotations

import math

from fdistill.config.sections import OptimizerConfig


def learning_rate(section: OptimizerConfig, iteration: int, iterations: int) -> float:
    """The learning rate of one iteration.

    With W = lr_warmup, iteration i < W has (i + 1) / W of lr. Afterwards "linear" has 1 - s of it, and "cosine"
    (1 + cos(pi s)) / 2, where s = (i - W) / (iterations - W): the first iteration after the warm-up has all of lr, and
    0 would come after the last. "inverse-sqrt" has 1 / sqrt(max(1, (i - W) / lr_hold)) of lr, however many iterations
    there are (EDM2, arXiv 2312.02696).

    Args:
        iteration: its number i, from 0.
        iterations: how many there are.
    """
    warmup = section.lr_warmup
    if iteration < warmup:
        return section.lr * (iteration + 1) / warmup
    if section.lr_schedule == "constant":
        return section.lr
    if section.lr_schedule == "inverse-sqrt":
        return section.lr / math.sqrt(max(1.0, (iteration - warmup) / section.lr_hold))
    share = (iteration - warmup) / (iterations - warmup)
    return section.lr * (1 - share if section.lr_schedule == "linear" else (1 + math.cos(math.pi * share)) / 2)


def is_constant(section: OptimizerConfig) -> bool:
    """Whether every iteration has the same learning rate."""
    return section.lr_schedule == "constant" and not section.lr_warmup

"""Diversity within classes or prompts: mean distance between two images that were asked for alike."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from evaluation.metrics.score import Score
from evaluation.metrics.spreads import mean_score
from fdistill.base.errors import ArgumentError


def pairs_within_groups(groups: Sequence[Hashable], *, pairs_per_group: int, seed: int) -> list[tuple[int, int]]:
    """Random distinct pairs i < j of indices with groups[i] == groups[j], the same for the same arguments.

    Args:
        groups: the label or prompt of each image.
        pairs_per_group: as many of each group, or all where it has fewer; none of a group with one member.

    Returns:
        The pairs of one group after those of another, in the order of the groups' first images.
    """
    if pairs_per_group < 1:
        raise ArgumentError(f"pairs_per_group: expected at least 1, got {pairs_per_group}")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    generator = random.Random(seed)
    pairs = []
    for inside in members.values():
        possible = math.comb(len(inside), 2)
        for number in generator.sample(range(possible), min(pairs_per_group, possible)):
            # Pairs (i, j) in the order (0,1) (0,2) (1,2) (0,3) ...: the first with j has number j (j - 1) / 2.
            j = (1 + math.isqrt(1 + 8 * number)) // 2
            pairs.append((inside[number - j * (j - 1) // 2], inside[j]))
    return pairs


def mean_of_groups(distances: Tensor, groups_of_pairs: Sequence[Hashable]) -> Score:
    """Mean over groups of the mean distance [P] of a group's pairs, so that each group counts the same.

    The spread is the standard error over groups; none for a single one.

    Args:
        distances: [P], floating-point.
        groups_of_pairs: the group of each pair.

    Raises:
        ArgumentError: no pairs, lengths differ, or a distance is not finite.
    """
    if distances.ndim != 1 or not len(distances) or len(distances) != len(groups_of_pairs):
        raise ArgumentError(
            f"distances: expected [P] with one of {len(groups_of_pairs)} groups for each pair and P > 0, "
            f"got {list(distances.shape)}"
        )
    if not distances.isfinite().all():
        pair = int((~distances.isfinite()).nonzero()[0])
        raise ArgumentError(
            f"distances: pair {pair} has {distances[pair]}; expected finite numbers: look at its images"
        )
    order = {group: number for number, group in enumerate(dict.fromkeys(groups_of_pairs))}
    group = torch.tensor([order[name] for name in groups_of_pairs])
    totals = torch.zeros(len(order), dtype=torch.float64).index_add_(0, group, distances.double().cpu())
    return mean_score(totals / group.bincount(minlength=len(order)), over="groups")

"""Diversity: the mean distance between two images of the same class or prompt, by LPIPS or in features."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from evaluation.metrics.metric import Measured, Metric
from evaluation.metrics.score import Score
from evaluation.metrics.spreads import mean_score
from fdistill.base.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.images import Images

_PAIRS = 10  # image pairs for each class or prompt
_GROUPS = 100  # classes or prompts at most, evenly chosen
_AT_ONCE = 32  # pairs in one pass of LPIPS


def pairs_within_groups(groups: Sequence[Hashable], *, pairs_per_group: int, seed: int) -> list[tuple[int, int]]:
    """Random distinct pairs i < j of indices with groups[i] == groups[j]; equal arguments give equal pairs.

    Args:
        groups: the label or prompt of each image.
        pairs_per_group: how many pairs to draw from each group; a group that has fewer gives all of them, and a group
            of one image gives none.

    Returns:
        The pairs, group by group, in the order of the groups' first images.
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
    """The mean over groups of the mean distance within a group, so that each group counts the same.

    The spread is the standard error over groups; a single group has none.

    Args:
        distances: floating-point [P], one for each pair.
        groups_of_pairs: the group of each of the P pairs.

    Raises:
        ArgumentError: there are no pairs, lengths differ, or a distance is not finite.
    """
    import torch

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


def lpips_diversity_metric() -> Metric:
    """Mean LPIPS between images of one class or prompt: 10 pairs each, of at most 100 classes or prompts."""

    def compute(measured: Measured) -> dict[str, Score]:
        import torch

        from evaluation.extractors.lpips import open_lpips

        pairs, groups = _chosen_pairs(measured)
        network, images = open_lpips(measured.device, measured.weights), measured.images
        distances = [
            network(images.read([i for i, _ in part]), images.read([j for _, j in part])).cpu()
            for part in (pairs[first : first + _AT_ONCE] for first in range(0, len(pairs), _AT_ONCE))
        ]
        return {"lpips_diversity": mean_of_groups(torch.cat(distances), groups)}

    return Metric(
        name="lpips_diversity",
        outputs=("lpips_diversity",),
        higher_is_better=True,
        compute=compute,
        needs="pairs",
        files=("vgg16", "lpips"),
    )


def feature_diversity_metric(name: str, features: str) -> Metric:
    """The same pairs as `lpips_diversity_metric`, with Euclidean distances between their features."""

    def compute(measured: Measured) -> dict[str, Score]:
        pairs, groups = _chosen_pairs(measured)
        first, second = (measured.samples[features][[pair[side] for pair in pairs]].double() for side in (0, 1))
        return {name: mean_of_groups((first - second).norm(dim=1), groups)}

    return Metric(
        name=name, outputs=(name,), higher_is_better=True, compute=compute, features=(features,), needs="pairs"
    )


def groups_of(images: Images) -> Sequence[Hashable]:
    """The class of each image, else its prompt; without either all are of one group."""
    if images.labels is not None:
        labels: list[int] = images.labels.tolist()
        return labels
    return ["all"] * len(images) if images.prompts is None else images.prompts


def _chosen_pairs(measured: Measured) -> tuple[list[tuple[int, int]], list[Hashable]]:
    """(pairs of images, the class or prompt of each pair)."""
    groups = groups_of(measured.images)
    pairs = pairs_within_groups(groups, pairs_per_group=_PAIRS, seed=0)
    found = list(dict.fromkeys(groups[i] for i, _ in pairs))
    chosen = set(found[:: -(-len(found) // _GROUPS)])
    pairs = [pair for pair in pairs if groups[pair[0]] in chosen]
    return pairs, [groups[i] for i, _ in pairs]

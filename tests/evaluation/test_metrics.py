"""Every score against a closed form, brute force in float64, or another library's own number."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from evaluation.metrics import distances
from evaluation.metrics import precision_recall as precision_recall_module
from evaluation.metrics.accuracy import accuracy
from evaluation.metrics.clip_score import clip_scores
from evaluation.metrics.density_coverage import density_coverage
from evaluation.metrics.diversity import mean_of_groups, pairs_within_groups
from evaluation.metrics.fid_infinity import frechet_infinity
from evaluation.metrics.frechet import distance_to, frechet_distance, frechet_score
from evaluation.metrics.inception_score import inception_score
from evaluation.metrics.kernel_distance import kernel_distance
from evaluation.metrics.memorisation import authenticity, nearest
from evaluation.metrics.moments import Moments
from evaluation.metrics.precision_recall import precision_recall
from fdistill.base.errors import ArgumentError


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(seed: int, count: int, width: int) -> Tensor:
    """Rows whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    rows = normal(seed, count, width)
    rows = rows - rows.mean(0)
    return rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / (count - 1))).T


def inception_like(seed: int, count: int, width: int) -> Tensor:
    """Float32 features as a network makes them: a power-law spectrum over five decades, and some that never fire."""
    basis = torch.linalg.qr(normal(99, width, width))[0]
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -1.25
    rows = normal(seed, count, width) * spectrum @ basis.T + 0.4
    rows[:, :: max(width // 10, 2)] = 0
    return rows.float()


def plain_distance(x: Tensor, y: Tensor) -> float:
    """The formula with matrix square roots by numpy, in float64."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    a, b = x.double().numpy(), y.double().numpy()
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = root(root(s1) @ s2 @ root(s1))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(cross))


def plain_distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] in float64 from the differences themselves."""
    return (x.double()[:, None] - y.double()[None]).square().sum(-1).sqrt()


# Frechet distance


def test_frechet_distance_of_gaussians_with_exact_moments() -> None:
    white = whitened(0, 500, 4)
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.3, -0.2, 0.0, 1.0])
    expected = (shift.double().square().sum() + (scale.double() - 1).square().sum()).item()
    samples, reference = Moments.of(white), Moments.of(white * scale + shift)
    assert math.isclose(frechet_distance(samples, reference), expected, rel_tol=1e-12)
    assert math.isclose(frechet_distance(reference, samples), expected, rel_tol=1e-12)
    assert math.isclose(distance_to(reference)(samples), expected, rel_tol=1e-9)
    # Covariances that do not commute, in two dimensions, where tr (S1 S2)^(1/2) = sqrt(tr S1 S2 + 2 sqrt(det S1 S2)).
    s1, s2 = torch.tensor([[2.0, 1.2], [1.2, 1.0]]).double(), torch.tensor([[1.0, -0.9], [-0.9, 3.0]]).double()
    product = s1 @ s2
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (s1.trace() + s2.trace() - 2 * cross).item()
    first, second = (Moments.known(torch.zeros(2), s) for s in (s1, s2))
    assert math.isclose(frechet_distance(first, second), expected, rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["full", "inception-like"])
def test_frechet_distance_is_torch_fidelitys_and_the_plain_formula(kind: str) -> None:
    if kind == "full":
        x, y = normal(0, 400, 24) @ normal(1, 24, 24), normal(2, 300, 24) + 0.5
    else:
        x, y = inception_like(0, 700, 300), 1.1 * inception_like(1, 900, 300) + 0.01
    ours = frechet_distance(Moments.of(x), Moments.of(y))
    parts = [fid_features_to_statistics(values.double()) for values in (x, y)]
    theirs = fid_statistics_to_metric(*parts, verbose=False)[KEY_METRIC_FID]
    assert abs(ours - theirs) < 1e-6 * max(1, theirs)
    assert abs(ours - plain_distance(x, y)) < 1e-6 * max(1, theirs)
    assert abs(distance_to(Moments.of(y))(Moments.of(x)) - ours) < 1e-5 * max(1, theirs)


@pytest.mark.parametrize("width", [300, 1024])
def test_a_set_is_at_no_distance_from_itself(width: int) -> None:
    """A tenth of the features never fire and most others have next to no variance."""
    rows = inception_like(0, width + 52, width)
    moments, again = Moments.of(rows), Moments(width)
    for part in rows.flip(0).split(width // 3):
        again.update(part)
    assert abs(frechet_distance(again, moments)) < 1e-9
    if width == 300:
        assert abs(frechet_distance(moments, moments)) < 1e-9


def test_order_and_batch_size_do_not_matter() -> None:
    x, reference = inception_like(0, 1000, 64), Moments.of(inception_like(1, 1000, 64) + 0.1)
    value = frechet_score(x, reference, replicates=0).value
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for size in (1, 37, 999):
        moments = Moments(64)
        for part in x[order].split(size):
            moments.update(part)
        assert math.isclose(frechet_distance(moments, reference), value, rel_tol=1e-9)


def test_a_covariance_that_starts_at_ones_would_be_seen() -> None:
    x, y = inception_like(0, 5000, 64), inception_like(1, 5000, 64)
    reference = Moments.of(y)
    wrong = Moments.known(Moments.of(x).mean, Moments.of(x).covariance + 1 / 4999)
    right = plain_distance(x, y)
    assert abs(frechet_distance(Moments.of(x), reference) - right) < 1e-6
    assert abs(frechet_distance(wrong, reference) - right) > 1e-3


def test_frechet_spread_is_that_of_new_samples() -> None:
    """Independent sets vary by about the bootstrap's spread; where the distance is all noise, by 1 / 1.8 of it."""
    width, count = 16, 400
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    reference = Moments.known(torch.zeros(width), torch.diag(scale**2))
    for shift, low, high in ((0.3, 0.6, 1.6), (0.0, 1.3, 2.4)):
        sets = [normal(seed, count, width) * scale + shift for seed in range(100)]
        actual = statistics.stdev(frechet_score(rows, reference, replicates=0).value for rows in sets)
        scores = [frechet_score(rows, reference, seed=seed) for seed, rows in enumerate(sets[:12])]
        ratio = statistics.mean(score.spread or 0 for score in scores) / actual
        assert low < ratio < high, (shift, ratio)
        assert scores[0].spread_of == "20 bootstrap replicates"
    first = frechet_score(sets[0], reference, replicates=5, seed=3)
    assert first == frechet_score(sets[0], reference, replicates=5, seed=3)
    assert first.value == frechet_score(sets[0], reference, replicates=0).value
    assert first.spread != frechet_score(sets[0], reference, replicates=5, seed=4).spread
    assert frechet_score(sets[0], reference, replicates=0).spread is None


def test_frechet_spread_of_classes_in_turn_is_that_of_new_samples_in_turn() -> None:
    """Classes far from one another, as many of each in every set: their shares do not vary, nor must a replicate's."""
    width, classes = 4, 8
    strata = torch.arange(400) % classes
    centres = 6 * normal(99, classes, width)
    sets = [normal(seed, 400, width) + 0.3 + centres[strata] for seed in range(100)]
    covariance = torch.eye(width, dtype=torch.float64) + torch.cov(centres.T, correction=0)
    reference = Moments.known(centres.mean(0), covariance)
    actual = statistics.stdev(frechet_score(rows, reference, replicates=0).value for rows in sets)
    within, across = (
        statistics.mean(frechet_score(rows, reference, strata=groups).spread or 0 for rows in sets[:12])
        for groups in (strata, None)
    )
    assert 0.6 < within / actual < 1.8
    assert across / actual > 3
    assert frechet_score(sets[0], reference, strata=strata).spread_of == "20 bootstrap replicates within classes"


def test_frechet_score_refuses() -> None:
    reference = Moments.of(normal(0, 50, 4))
    with pytest.raises(ArgumentError, match=r"samples: expected more than 4 rows.* singular .* got 4"):
        frechet_score(normal(1, 4, 4), reference)
    with pytest.raises(ArgumentError, match=r"reference: expected more than 4 rows"):
        frechet_score(normal(1, 9, 4), Moments.of(normal(0, 4, 4)))
    with pytest.raises(ArgumentError, match="got 3 and 4"):
        frechet_score(normal(1, 9, 3), reference)
    with pytest.raises(ArgumentError, match="at least 2, got 1"):
        frechet_score(normal(1, 9, 4), reference, replicates=1)
    with pytest.raises(ArgumentError, match="row 7"):
        frechet_score(normal(1, 9, 4).index_fill(0, torch.tensor([7]), torch.nan), reference)
    with pytest.raises(ArgumentError, match="not a covariance"):
        frechet_distance(reference, Moments.known(torch.zeros(4), torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.5]))))
    # What rounding to float32 does to a published covariance is no reason to refuse it, and counts as zero.
    rounded = Moments.known(torch.zeros(4), torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-5])))
    found = frechet_distance(Moments.known(torch.zeros(4), torch.eye(4)), rounded)
    assert math.isclose(found, 4 + 3 - 1e-5 - 2 * 3, rel_tol=1e-9)
    rows = inception_like(0, 500, 64)
    stored = Moments.known(Moments.of(rows).mean.float(), Moments.of(rows).covariance.float())
    assert abs(frechet_distance(Moments.of(rows), stored)) < 1e-2


def test_frechet_infinity_is_nearer_the_truth() -> None:
    width, count = 16, 640
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    reference = Moments.known(torch.zeros(width), torch.diag(scale**2))
    truth = width * 0.1**2
    sets = [normal(seed, count, width) * scale + 0.1 for seed in range(24)]
    plain = [frechet_score(rows, reference, replicates=0).value for rows in sets]
    found = [frechet_infinity(rows, reference, seed=seed) for seed, rows in enumerate(sets)]
    bias = statistics.mean(plain) - truth
    error = statistics.stdev(score.value for score in found) / math.sqrt(len(sets))
    assert bias > 0.015
    assert abs(statistics.mean(score.value for score in found) - truth) < min(3 * error, bias / 2)
    assert all(score.spread is not None and 0 < score.spread < 0.1 for score in found)


def test_frechet_infinity_is_numpys_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation.metrics import fid_infinity

    def measured(reference: Moments) -> Callable[[Moments], float]:
        def distance(samples: Moments) -> float:
            assert samples.count is not None
            sizes.append(samples.count)
            values.append(2 + 300 / samples.count + math.sin(samples.count))
            return values[-1]

        return distance

    sizes: list[int] = []
    values: list[float] = []
    monkeypatch.setattr(fid_infinity, "distance_to", measured)
    score = frechet_infinity(normal(0, 1000, 4), Moments.of(normal(1, 100, 4)), points=10)
    assert sizes == list(range(100, 1001, 100))
    slopes, covariance = np.polyfit(1 / np.array(sizes), values, 1, cov=True)
    assert math.isclose(score.value, slopes[1], rel_tol=1e-9)
    assert math.isclose(score.spread or 0, math.sqrt(covariance[1, 1]), rel_tol=1e-9)
    sizes.clear()
    frechet_infinity(normal(0, 80, 8), Moments.of(normal(1, 100, 8)), points=3)
    assert sizes == [16, 48, 80]
    with pytest.raises(ArgumentError, match="more than 31 rows"):
        frechet_infinity(normal(0, 31, 8), Moments.of(normal(1, 100, 8)))
    with pytest.raises(ArgumentError, match="at least 3"):
        frechet_infinity(normal(0, 80, 8), Moments.of(normal(1, 100, 8)), points=2)
    with pytest.raises(ArgumentError, match=r"\[N, 8\]"):
        frechet_infinity(normal(0, 80, 7), Moments.of(normal(1, 100, 8)))


# Kernel distance, Inception Score


def test_kernel_distance_against_loops() -> None:
    x, y = normal(0, 12, 5), normal(1, 12, 5) * 1.3 + 0.2

    def kernel(a: Tensor, b: Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    pairs = list(itertools.permutations(range(12), 2))
    expected = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / 144
    score = kernel_distance(x, y, subsets=3, subset_size=12)
    assert math.isclose(score.value, expected, rel_tol=1e-10)
    assert score.spread is None  # all three subsets are the whole sets


def test_kernel_distance_is_torch_fidelitys_in_float64() -> None:
    x, y = inception_like(0, 200, 30), inception_like(1, 150, 30) * 1.2
    theirs = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=9, kid_subset_size=70, rng_seed=2020, verbose=False
    )
    score = kernel_distance(x, y, subsets=9, subset_size=70)
    assert math.isclose(score.value, theirs[KEY_METRIC_KID_MEAN], rel_tol=1e-12)
    assert math.isclose(score.spread or 0, theirs[KEY_METRIC_KID_STD], rel_tol=1e-12)
    assert score.spread_of == "9 subsets of 70"
    with pytest.raises(ArgumentError, match=r"reference rows: expected more than 169 rows.*170; got 150"):
        kernel_distance(x, y, subset_size=170)
    with pytest.raises(ArgumentError, match="got 1 and 100"):
        kernel_distance(x, y, subset_size=1)


def test_inception_score_of_known_predictions() -> None:
    assert math.isclose(inception_score(torch.zeros(100, 7)).value, 1, rel_tol=1e-12)
    for classes in (2, 10):
        sure = 200 * torch.eye(classes).repeat(50, 1)
        score = inception_score(sure, splits=1)
        assert math.isclose(score.value, classes, rel_tol=1e-9)
        assert score.spread is None
    # Two kinds of images, each with probabilities (p, 1 - p) and (1 - p, p): exp(log 2 - H(p)).
    p = 0.8
    logits = torch.tensor([[math.log(p), math.log(1 - p)], [math.log(1 - p), math.log(p)]]).repeat(20, 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert math.isclose(inception_score(logits, splits=1).value, 2 * math.exp(-entropy), rel_tol=1e-6)


def test_inception_score_is_torch_fidelitys() -> None:
    logits = 3 * normal(0, 205, 20).float()
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    score = inception_score(logits)
    assert (score.value, score.spread) == (theirs[KEY_METRIC_ISC_MEAN], theirs[KEY_METRIC_ISC_STD])
    assert score.spread_of == "10 splits"
    with pytest.raises(ArgumentError, match="10 splits"):
        inception_score(logits[:9])
    with pytest.raises(ArgumentError, match="probability 0"):
        inception_score(torch.tensor([[0.0, 1e4]]).repeat(20, 1))


# Precision and recall, density and coverage


def brute_precision(x: Tensor, y: Tensor, k: int) -> float:
    radii = plain_distances(y, y).sort(dim=1).values[:, k]
    return (plain_distances(x, y) <= radii).any(dim=1).double().mean().item()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in each direction where a test's sets would fit into one."""
    monkeypatch.setattr(distances, "_BLOCK", 1500)
    monkeypatch.setattr(distances, "_COLUMNS", 64)
    monkeypatch.setattr(precision_recall_module, "_BLOCK", 15_000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_precision_and_recall_against_brute_force(offset: float) -> None:
    x, y = (normal(0, 210, 40) * 0.9 + 0.2 + offset).float(), (normal(1, 160, 40) + offset).float()
    precision, recall = precision_recall(x, y, 4)
    expected = brute_precision(x, y, 4), brute_precision(y, x, 4)
    assert 0.2 < expected[1] < expected[0] < 1  # swapped ones would be seen
    assert precision.value == pytest.approx(expected[0], abs=1e-6)
    assert recall.value == pytest.approx(expected[1], abs=1e-6)
    assert precision.spread == pytest.approx(math.sqrt(expected[0] * (1 - expected[0]) / 210), rel=1e-4)
    assert recall.spread == pytest.approx(math.sqrt(expected[1] * (1 - expected[1]) / 160), rel=1e-4)
    if not offset:
        theirs = prc_features_to_metric(
            x, y, prc_neighborhood=4, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
        )
        assert precision.value == pytest.approx(theirs[KEY_METRIC_PRECISION], abs=1e-6)
        assert recall.value == pytest.approx(theirs[KEY_METRIC_RECALL], abs=1e-6)


def test_precision_is_of_samples_and_recall_of_the_reference() -> None:
    real = torch.cat([normal(0, 200, 2), normal(1, 200, 2) + 30])
    precision, recall = precision_recall(normal(2, 200, 2), real)
    assert precision.value > 0.9
    assert 0.4 < recall.value < 0.55
    same = precision_recall(inception_like(0, 300, 64), inception_like(0, 300, 64))
    assert [score.value for score in same] == [1, 1]
    with pytest.raises(ArgumentError, match="more than 3 rows"):
        precision_recall(normal(0, 3, 2), real)
    with pytest.raises(ArgumentError, match="at least 1"):
        precision_recall(real, real, 0)
    with pytest.raises(ArgumentError, match="got 2 and 3"):
        precision_recall(real, normal(0, 9, 3))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_density_and_coverage_against_brute_force(offset: float) -> None:
    x, y = (normal(0, 210, 6) * 0.8 + 0.3 + offset).float(), (normal(1, 160, 6) + offset).float()
    radii = plain_distances(y, y).sort(dim=1).values[:, 5]
    inside = plain_distances(x, y) < radii
    per_sample = inside.double().sum(1) / 5
    density, coverage = density_coverage(x, y)
    assert density.value == pytest.approx(per_sample.mean().item(), rel=1e-12)
    assert density.spread == pytest.approx(per_sample.std().item() / math.sqrt(210), rel=1e-12)
    share = inside.any(0).double().mean().item()
    assert 0.1 < share < 0.99
    assert coverage.value == pytest.approx(share, rel=1e-12)
    assert coverage.spread == pytest.approx(math.sqrt(share * (1 - share) / 160), rel=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.thorough
def test_density_and_coverage_of_equal_distributions() -> None:
    density, coverage = density_coverage(normal(0, 2000, 3), normal(1, 1000, 3))
    assert density.value == pytest.approx(1, abs=4 * (density.spread or 0) + 0.03)
    # A ball is missed by all samples if the k nearest of all points around its centre are real (Naeem et al., Lemma 2).
    missed = math.prod((1000 - i) / (1000 + 2000 - i) for i in range(1, 6))
    assert coverage.value == pytest.approx(1 - missed, abs=0.01)
    half = density_coverage(normal(0, 1000, 3), normal(1, 1000, 3))[1]
    missed = math.prod((1000 - i) / (2000 - i) for i in range(1, 6))
    assert half.value == pytest.approx(1 - missed, abs=0.03)
    far = density_coverage(normal(0, 50, 3) + 100, normal(1, 100, 3))
    assert [score.value for score in far] == [0, 0]
    # Ties stay ties: of a set with itself, each ball has k samples inside, and its k-th neighbour on the border.
    rows = inception_like(0, 300, 64) + 5
    same = density_coverage(rows, rows.clone())
    assert [score.value for score in same] == [1, 1]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_distances_between_copies_are_zero_and_others_exact(offset: float) -> None:
    rows = (normal(0, 150, 64) + offset).float()
    found = torch.cat([block for _, block in distances.distance_blocks(rows, rows)])
    assert found.dtype == torch.float32
    assert (found.diagonal() == 0).all()
    torch.testing.assert_close(found.double(), plain_distances(rows, rows), rtol=1e-6, atol=0)


# Accuracy, diversity, memorisation


def test_accuracy() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    score = accuracy(logits, torch.tensor([1, 0, 1, 1]))
    assert (score.value, score.spread_of) == (0.75, "binomial")
    assert score.spread == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    for labels, message in (
        (torch.tensor([1, 0, 1]), r"integers \[4\]"),
        (torch.ones(4), "integers"),
        (torch.tensor([0, 1, 2, 0]), "0 to 1"),
        (torch.tensor([0, 1, -1, 0]), "0 to 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            accuracy(logits, labels)


def test_pairs_are_distinct_and_within_groups() -> None:
    groups = ["a", "b", "a", "c", "b", "a", "a", "b"]
    everything = pairs_within_groups(groups, pairs_per_group=100, seed=0)
    assert sorted(everything) == sorted(
        (i, j) for i, j in itertools.combinations(range(8), 2) if groups[i] == groups[j]
    )
    some = pairs_within_groups(groups, pairs_per_group=2, seed=0)
    assert some == pairs_within_groups(groups, pairs_per_group=2, seed=0)
    assert [groups[i] for i, _ in some] == ["a", "a", "b", "b"]
    assert len(set(some)) == 4
    assert all(i < j and groups[i] == groups[j] for i, j in some)
    assert pairs_within_groups(["a", "b"], pairs_per_group=5, seed=0) == []
    with pytest.raises(ArgumentError, match="at least 1"):
        pairs_within_groups(groups, pairs_per_group=0, seed=0)


def test_pairs_are_uniform_and_need_no_list_of_all() -> None:
    found = [pairs_within_groups([0] * 5, pairs_per_group=1, seed=seed)[0] for seed in range(4000)]
    counts = [found.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert sum(counts) == 4000
    assert sum((count - 400) ** 2 / 400 for count in counts) < 30  # chi-square with 9 degrees: P(> 30) = 4e-4
    many = pairs_within_groups([0] * 3_000_000, pairs_per_group=50, seed=1)
    assert len({*many}) == 50
    assert all(0 <= i < j < 3_000_000 for i, j in many)
    assert max(j for _, j in many) > 2_000_000


def test_each_group_counts_the_same() -> None:
    score = mean_of_groups(torch.tensor([1.0, 2.0, 3.0, 10.0]), ["x", "x", "x", "y"])
    assert score.value == 6
    assert score.spread == pytest.approx(4)  # of means 2 and 10: deviation sqrt(32), over sqrt(2)
    assert score.spread_of == "standard error over 2 groups"
    assert mean_of_groups(torch.tensor([1.0, 2.0]), [0, 0]).spread is None
    with pytest.raises(ArgumentError, match=r"P > 0"):
        mean_of_groups(torch.zeros(0), [])
    with pytest.raises(ArgumentError, match="one of 2 groups"):
        mean_of_groups(torch.zeros(3), [0, 0])
    with pytest.raises(ArgumentError, match="pair 1"):
        mean_of_groups(torch.tensor([0.0, math.nan]), [0, 0])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_nearest_training_row_against_brute_force(offset: float) -> None:
    x, training = (normal(0, 100, 8) + offset).float(), (normal(1, 170, 8) + offset).float()
    x[7] = training[33]
    distance, index = nearest(x, training)
    expected = plain_distances(x, training).min(dim=1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(distance, expected.values, rtol=1e-14, atol=0)
    assert (distance[7], index[7]) == (0, 33)
    own = plain_distances(training, training).fill_diagonal_(math.inf).min(dim=1).values
    share = (expected.values > own[expected.indices]).double().mean().item()
    assert 0.2 < share < 0.8
    assert authenticity(x, training).value == share


@pytest.mark.usefixtures("small_blocks")
def test_authenticity_of_copies_and_of_new_samples() -> None:
    training = inception_like(0, 300, 16)
    assert authenticity(training[torch.arange(0, 300, 3)], training).value == 0
    assert authenticity(training[:50] + 100, training).value == 1
    # Two of n + 1 points are each other's nearest with chance |ball| / |union of two balls at their radius| per point.
    for width, mutual in ((1, 2 / 3), (2, 6 * math.pi / (8 * math.pi + 3 * math.sqrt(3)))):
        generator = torch.Generator().manual_seed(width)
        cloud = [torch.rand(600, width, generator=generator, dtype=torch.float64) for _ in range(8)]
        score = statistics.mean(authenticity(part[:300], part[300:]).value for part in cloud)
        assert score == pytest.approx(1 - mutual, abs=0.035), width
    with pytest.raises(ArgumentError, match="training rows: expected more than 1 rows"):
        authenticity(training, training[:1])
    with pytest.raises(ArgumentError, match="training rows: row 3"):
        nearest(training, training.index_fill(0, torch.tensor([3]), math.inf))


# CLIP scores


def test_clip_scores_by_hand() -> None:
    """Cosines 1, 0.6 and -1, of features of any length."""
    image = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.5]])
    text = torch.tensor([[5.0, 0.0], [10.0, 0.0], [0.0, -7.0]])
    scores = clip_scores(image, text)
    assert set(scores) == {"clip_cosine", "clip_x100", "clipscore"}
    assert scores["clip_cosine"].value == pytest.approx(0.2, rel=1e-12)
    assert scores["clip_x100"].value == pytest.approx(20, rel=1e-12)
    assert scores["clipscore"].value == pytest.approx(2.5 * 1.6 / 3, rel=1e-12)
    error = statistics.stdev([1, 0.6, -1]) / math.sqrt(3)
    assert scores["clip_cosine"].spread == pytest.approx(error, rel=1e-12)
    assert scores["clip_x100"].spread == pytest.approx(100 * error, rel=1e-12)
    assert scores["clipscore"].spread == pytest.approx(2.5 * statistics.stdev([1, 0.6, 0]) / math.sqrt(3), rel=1e-12)
    negative = clip_scores(image, -text)
    assert negative["clip_cosine"].value == pytest.approx(-0.2)
    assert negative["clip_x100"].value == 0
    assert negative["clipscore"].value == pytest.approx(2.5 / 3)
    assert clip_scores(image[:1], text[:1])["clip_cosine"].spread is None


def test_clip_scores_refuse() -> None:
    features = normal(0, 4, 3)
    with pytest.raises(ArgumentError, match="4 images and 3 prompts"):
        clip_scores(features, features[:3])
    with pytest.raises(ArgumentError, match="row 2 is zero"):
        clip_scores(features, features.index_fill(0, torch.tensor([2]), 0))
    with pytest.raises(ArgumentError, match="text_features: row 1"):
        clip_scores(features, features.index_fill(0, torch.tensor([1]), math.nan))


@pytest.mark.parametrize(
    "metric",
    [kernel_distance, precision_recall, density_coverage, nearest, authenticity, clip_scores],
    ids=lambda metric: metric.__name__,
)
def test_rows_that_no_metric_takes(metric: Callable[[Tensor, Tensor], object]) -> None:
    good = normal(0, 1001, 4)
    for wrong, message in (
        (good[:, :3], "same number of features"),
        (good[:0], "more than"),
        (good[0], r"\[N, D\]"),
        (good.long(), "floating-point"),
        (good.index_fill(0, torch.tensor([900]), math.nan), "row 900"),
    ):
        for arguments in ((wrong, good), (good, wrong)):
            with pytest.raises(ArgumentError, match=message):
                metric(*arguments)

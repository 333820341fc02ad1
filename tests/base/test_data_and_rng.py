from __future__ import annotations

import pytest
import torch

from fdistill.base import rng
from fdistill.base.errors import ConfigError
from fdistill.base.images import to_uint8, to_unit
from fdistill.data import EpochOrder, load_data


def test_digits() -> None:
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert (data.images.min(), data.images.max()) == (0, 255)
    assert len(data.images.unique()) == 17
    assert torch.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_data("digit")


def test_every_item_once_an_epoch_across_batch_borders() -> None:
    order = EpochOrder(10, 4, seed=0)
    rows = torch.cat([order.rows(batch) for batch in range(5)])
    assert sorted(rows[:10].tolist()) == list(range(10))
    assert sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_any_batch_is_found_without_its_predecessors() -> None:
    first, second = EpochOrder(10, 7, seed=3), EpochOrder(10, 7, seed=3)
    expected = [first.rows(batch) for batch in range(6)]
    for batch in (5, 0, 3):
        assert torch.equal(second.rows(batch), expected[batch])
    assert not torch.equal(EpochOrder(10, 7, seed=4).rows(0), expected[0])


def test_batches_larger_than_the_set() -> None:
    rows = EpochOrder(3, 8, seed=0).rows(0)
    assert len(rows) == 8
    assert sorted(rows[:3].tolist()) == [0, 1, 2]


def test_indexed_noise_depends_on_seed_and_index_alone() -> None:
    together = rng.indexed_normal(7, range(20), (2, 3))
    assert torch.equal(rng.indexed_normal(7, [13], (2, 3))[0], together[13])
    assert torch.equal(rng.indexed_normal(7, [19, 4], (2, 3)), together[[19, 4]])
    # Image 13 of a student of four steps begins with the noise of any other model's image 13.
    assert torch.equal(rng.indexed_normal(7, [13], (4, 2, 3))[0, 0], together[13])
    # Large seeds keep all their bits.
    draws = [rng.indexed_normal(seed, [0], (4,)) for seed in (0, 1, 2**63, 2**63 + 1, 2**64 - 1)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 5
    # The trap of seed + index: image 1 of seed 0 must not be image 0 of seed 1.
    assert not torch.equal(rng.indexed_normal(8, [12], (2, 3))[0], together[13])


def test_indexed_noise_is_standard_normal() -> None:
    noise = rng.indexed_normal(0, range(2000), (64,))
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01
    assert torch.corrcoef(noise)[0, 1:].abs().max() < 0.6


def test_derived_seeds_differ() -> None:
    seeds = {rng.derived_seed(seed, stream, step) for seed in range(10) for stream in range(3) for step in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bytes_round_trip_and_clip_before_rounding() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(values)), values)
    assert to_uint8(torch.tensor([-1.4, 1.4])).tolist() == [0, 255]
    assert to_uint8(torch.tensor([-1 + 0.6 / 127.5])).item() == 1


def test_the_numbers_of_streams_stay() -> None:
    """A changed number would change what a seed gives, in runs and in images."""
    assert {name: int(stream) for name, stream in rng.Stream.__members__.items()} == {
        "PIPELINE": 0,
        "SHUFFLE": 1,
        "PIPELINE_GLOBAL": 1,
        "STEP": 2,
        "DROPOUT": 3,
        "STUDENT_STEP": 4,
        "FLIP": 5,
        "LATENT": 6,
        "NO_CONDITION": 7,
        "EVALUATED_LABELS": 11,
        "GROUP": 12,
        "GROUP_ORDER": 13,
    }
    assert rng.derived_seed(3, rng.Stream.STEP, 5) == 8457714677105321250

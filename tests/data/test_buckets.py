"""Aspect-ratio buckets: which shapes there are, who gets which, and in what order batches come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdistill.base.errors import ArgumentError
from fdistill.data import open_source
from fdistill.data.buckets import Rows, bucket_sizes, nearest, sort_into_buckets
from fdistill.data.order import GroupOrder
from fdistill.data.recipes import RECIPES

#: (height, width) of SDXL's table (arXiv 2307.01952, appendix I) whose area is the largest for their height, for aspect
#: ratios of at most 2.
SDXL = [(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)]
SDXL += [(width, height) for height, width in reversed(SDXL[:-1])]


def test_the_shapes_of_1024_are_sdxls() -> None:
    found = bucket_sizes(1024, 64)
    others = [size for size in found if size not in SDXL]
    assert [size for size in found if size in SDXL] == [size for size in SDXL if size in found]
    assert set(SDXL) - set(found) <= {
        (704, 1408),
        (1408, 704),
    }  # 704 x 1472 has more pixels, and an aspect ratio over 2
    assert not others


@pytest.mark.parametrize(("resolution", "multiple"), [(16, 4), (512, 64), (768, 32), (1024, 16)])
def test_shapes_fill_the_area(resolution: int, multiple: int) -> None:
    found = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in found
    assert sorted(found) == sorted((width, height) for height, width in found)
    assert len(set(found)) == len(found)
    for height, width in found:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2 < max(height, width) * min(height, width) + max(height, width) * multiple
        assert max(height, width) <= 2 * min(height, width)


def test_shapes_need_a_divisor_of_the_resolution() -> None:
    for multiple in (0, 48):
        with pytest.raises(ArgumentError, match="expected a number of pixels that divides the resolution, 1024"):
            bucket_sizes(1024, multiple)


def test_an_image_gets_the_shape_that_is_nearest_by_ratio() -> None:
    sizes = [(1, 2), (1, 1), (2, 1)]
    assert [nearest(sizes, *size) for size in ((100, 100), (100, 140), (100, 143), (143, 100), (9, 1))] == [
        1,
        1,
        0,
        2,
        2,
    ]


def folder(path: Path, sizes: list[tuple[int, int]], turned: tuple[int, ...] = ()) -> Path:
    """Images of these heights and widths; those in `turned` are stored on their side."""
    path.mkdir()
    for i, (height, width) in enumerate(sizes):
        exif = Image.Exif()
        if i in turned:
            exif[0x0112] = 6
        pixels = np.full((height, width, 3), 10 * i, np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02}.png", exif=exif)
    return path


def test_images_are_sorted_and_rare_shapes_go_to_the_next(tmp_path: Path) -> None:
    wide, square, tall = (12, 20), (16, 16), (20, 12)
    sizes = [wide, wide, square, tall, square, wide, (30, 20)]
    path = folder(tmp_path / "images", [*sizes, wide], turned=(7,))
    (path / "99.png").write_bytes(b"no image")
    source = open_source(str(path))
    buckets = sort_into_buckets(source, 16, 4)
    assert [(each.height, each.width, each.rows) for each in buckets] == [
        (12, 20, [0, 1, 5, 8]),  # the unreadable one where most are
        (16, 16, [2, 4]),
        (20, 12, [3, 6, 7]),
    ]
    fewer = sort_into_buckets(source, 16, 4, least=3)
    assert [(each.height, each.width) for each in fewer] == [(12, 20), (20, 12)]
    assert sorted(row for each in fewer for row in each.rows) == list(range(9))
    (all_squares,) = sort_into_buckets(source, 16, 4, least=10)
    assert (all_squares.height, all_squares.width) == (16, 16)
    with pytest.raises(ArgumentError, match="bucket_images: got 0; expected at least 1"):
        sort_into_buckets(source, 16, 4, least=0)


def test_rows_of_a_data_set_are_a_data_set(tmp_path: Path) -> None:
    source = open_source(str(folder(tmp_path / "images", [(4, 4)] * 5)))
    part = Rows(source, [3, 1])
    assert [part.item_name(i) for i in range(len(part))] == ["03.png", "01.png"]
    assert part.encoded(0) == source.encoded(3)
    assert part.labels.tolist() == [0, 0]
    assert part.captions is None


@pytest.mark.parametrize("name", ["center-box", "center-lanczos", "adm"])
def test_a_shape_keeps_the_middle_and_the_proportions(name: str) -> None:
    """A disc stays a disc, in the middle; squashing alone makes it an ellipse."""
    y, x = np.mgrid[:96, :200]
    disc = (np.hypot(y - 47.5, x - 99.5) < 30).astype(np.uint8) * 255
    made = np.asarray(RECIPES[name](Image.fromarray(disc), 24, 32)).astype(float) / 255
    assert made.shape == (24, 32)
    radius = (made.sum() / np.pi) ** 0.5
    assert radius == pytest.approx(30 * 24 / 96, rel=0.02)
    assert made.sum(0).max() == pytest.approx(made.sum(1).max(), rel=0.05)
    assert np.abs(made - made[::-1, ::-1]).max() < 0.1
    squashed = np.asarray(RECIPES["squash"](Image.fromarray(disc), 24, 32)).astype(float) / 255
    assert squashed.sum(0).max() > 1.2 * squashed.sum(1).max()


GROUPS = [5, 40, 20]


def test_a_batch_is_of_one_group_and_every_row_comes_once_before_any_comes_again() -> None:
    order, batch = GroupOrder(GROUPS, 4, seed=3), 4
    starts = np.cumsum([0, *GROUPS])
    seen: dict[int, list[int]] = {group: [] for group in range(3)}
    for number in range(400):
        rows = order.rows(number)
        group = order.group(number)
        assert rows.shape == (batch,)
        assert bool(((rows >= starts[group]) & (rows < starts[group + 1])).all())
        seen[group] += rows.tolist()
    for group, rows in seen.items():
        count = GROUPS[group]
        for epoch in range(len(rows) // count):
            assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(starts[group], starts[group + 1]))


def test_groups_are_drawn_in_proportion_to_their_sizes() -> None:
    order, count = GroupOrder(GROUPS, 4, seed=1), 10_000
    drawn = torch.tensor([order.group(number) for number in range(count)]).bincount() / count
    assert drawn.tolist() == pytest.approx([each / sum(GROUPS) for each in GROUPS], abs=0.015)


def test_a_batch_is_found_without_its_predecessors() -> None:
    order = GroupOrder(GROUPS, 4, seed=3)
    in_turn = [order.rows(number).tolist() for number in range(50)]
    for number in (49, 7, 0, 5000):
        assert GroupOrder(GROUPS, 4, seed=3).rows(number).tolist() == order.rows(number).tolist()
    assert [GroupOrder(GROUPS, 4, seed=3).rows(number).tolist() for number in range(50)] == in_turn
    assert [GroupOrder(GROUPS, 4, seed=4).rows(number).tolist() for number in range(50)] != in_turn


def test_a_group_smaller_than_a_batch_repeats_its_rows() -> None:
    order = GroupOrder([2], 5, seed=0)
    rows = torch.cat([order.rows(number) for number in range(4)])
    assert rows.bincount().tolist() == [10, 10]

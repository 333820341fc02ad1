"""Mean and covariance against numpy's, in one piece, in parts and over two real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.metrics.moments import Moments
from fdistill.base.errors import ArgumentError
from support.processes import launch


def features(count: int, width: int = 5, *, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Correlated columns of different scales, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + offset


def check(moments: Moments, rows: torch.Tensor) -> None:
    """Against numpy on rows without their offset, so that the oracle itself loses no digits."""
    origin = rows[0].double()
    centred = (rows.double() - origin).numpy()
    assert moments.count == len(rows)
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    np.testing.assert_allclose((moments.mean - origin).numpy(), centred.mean(0), rtol=0, atol=1e-10)
    expected = np.cov(centred, rowvar=False)
    np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_two_rows_by_hand() -> None:
    moments = Moments.of(torch.tensor([[1.0, 2.0], [3.0, 8.0]]))
    assert moments.mean.tolist() == [2.0, 5.0]
    assert moments.covariance.tolist() == [[2.0, 6.0], [6.0, 18.0]]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("batches", [[300], [1, 2, 0, 297], [7] * 42 + [6], [299, 1]])
def test_batches_of_any_size_give_numpys_covariance(batches: list[int], offset: float) -> None:
    rows = features(300, offset=offset)
    moments = Moments(5)
    for part in rows.split(batches):
        moments.update(part)
    check(moments, rows)


def test_rows_beyond_one_internal_chunk() -> None:
    rows = features(9001, 3, offset=1e4)
    check(Moments.of(rows), rows)


def test_merging_parts_of_different_sizes_and_empty_ones() -> None:
    rows = features(300, offset=1e4)
    parts = [Moments.of(part) for part in rows.split([0, 1, 250, 0, 49])]
    total = Moments(5)
    for part in parts:
        total.merge(part)
    check(total, rows)
    check(parts[2], rows[1:251])  # left as it was
    reverse = Moments(5)
    for part in reversed(parts):
        reverse.merge(part)
    check(reverse, rows)
    # Many merges keep the digits.
    many = Moments(5)
    for row in rows:
        many.merge(Moments.of(row[None]))
    check(many, rows)


def test_rows_that_count_several_times() -> None:
    rows = features(50, offset=1e4)
    counts = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    moments = Moments(5)
    moments.update(rows[:20], counts[:20])
    moments.update(rows[20:], counts[20:])
    moments.update(rows, torch.zeros(50, dtype=torch.int64))
    check(moments, rows.repeat_interleave(counts, dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rows_are_summed_in_float64(dtype: torch.dtype) -> None:
    rows = features(500, offset=30.0).to(dtype)
    check(Moments.of(rows), rows)


def test_published_statistics_keep_their_numbers_and_can_be_added_to() -> None:
    rows = features(80)
    first, rest = rows[:60], rows[60:]
    published = Moments.of(first)
    again = Moments.known(published.mean, published.covariance, 60)
    torch.testing.assert_close(again.covariance, published.covariance, rtol=1e-15, atol=0)
    again.merge(Moments.of(rest))
    check(again, rows)
    unknown = Moments.known(published.mean.float(), published.covariance)
    assert unknown.count is None
    assert unknown.mean.dtype == torch.float64
    assert torch.equal(unknown.covariance, published.covariance)
    for adding in (lambda: unknown.update(rest), lambda: unknown.merge(published), lambda: published.merge(unknown)):
        with pytest.raises(ArgumentError, match="unknown number"):
            adding()
    check(published, first)


def test_what_is_refused() -> None:
    moments = Moments(2)
    with pytest.raises(ArgumentError, match="at least 2 rows, got 0"):
        _ = moments.covariance
    moments.update(torch.zeros(3, 2))
    broken = torch.zeros(4, 2)
    broken[2, 1] = float("nan")
    with pytest.raises(ArgumentError, match="row 5"):
        moments.update(broken)
    with pytest.raises(ArgumentError, match="row 4098"):
        Moments.of(torch.cat([torch.zeros(4096, 2), broken]))
    for wrong in (torch.zeros(3, 3), torch.zeros(2), torch.zeros(3, 2, dtype=torch.uint8)):
        with pytest.raises(ArgumentError, match=r"\[B, 2\]"):
            moments.update(wrong)
    with pytest.raises(ArgumentError, match="2 features"):
        moments.merge(Moments(3))
    with pytest.raises(ArgumentError, match=r"\[N, D\]"):
        Moments.of(torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"\[D, D\]"):
        Moments.known(torch.zeros(2), torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="NaN"):
        Moments.known(torch.zeros(2), torch.full((2, 2), float("inf")))
    with pytest.raises(ArgumentError, match="at least 2"):
        Moments.known(torch.zeros(2), torch.eye(2), 1)
    assert moments.count == 3  # nothing of what was refused has entered
    assert moments.covariance.abs().max() == 0


WORKER = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from safetensors.torch import load_file, save_file
from evaluation.metrics.moments import Moments

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, rank = Path(sys.argv[1]), dist.get_rank()
rows = load_file(folder / "rows.safetensors")["rows"]
results = {}
none = rows[:0]
for name, share in (("unequal", (rows[:70], rows[70:])), ("empty", (none, rows)), ("nothing", (none, none))):
    mine = Moments.of(share[rank])
    everything = mine.over_processes()
    results[name + ".count"] = torch.tensor(everything.count)
    results[name + ".mean"] = everything.mean
    results[name + ".covariance"] = everything.covariance if everything.count else torch.zeros(0)
    assert mine.count == len(share[rank])
    if len(share[rank]):
        assert torch.equal(mine.covariance, Moments.of(share[rank]).covariance)
save_file(results, folder / f"{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.thorough
def test_two_processes_with_unequal_shares(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    rows = features(300, offset=1e4)
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch([str(script), str(tmp_path)])
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
    for name in ("unequal", "empty"):
        mean, covariance = (results[0][f"{name}.{what}"] for what in ("mean", "covariance"))
        assert results[0][f"{name}.count"] == 300
        check(Moments.known(mean, covariance, 300), rows)
    assert results[0]["nothing.count"] == 0
    one = Moments.of(rows)
    assert one.over_processes() is one  # no other processes here

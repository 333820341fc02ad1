"""The stream of images through extractors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation import features
from evaluation.extractors import Extractor
from evaluation.features import (
    Extraction,
    Reading,
    ahead,
    cached_moments,
    cached_rows,
    extract_moments,
    extract_rows,
    extract_texts,
)

CPU = torch.device("cpu")


class Numbered:
    """Image i is i everywhere; what was read is written down."""

    def __init__(self, count: int, content: str | None = None):
        self.name, self.labels, self.prompts = "numbered", None, [f"prompt {i}" for i in range(count)]
        self.facts: dict[str, Any] = {}
        self.count, self.content = count, content
        self.reads: list[list[int]] = []

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Tensor:
        self.reads.append(list(indices))
        return torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)

    def sha256(self) -> str | None:
        return self.content


def mean_extractor(name: str = "mean", sha256: str = "a") -> tuple[Extractor, list[int]]:
    """[value, value^2] of each image, and the sizes of the batches it saw."""
    batches: list[int] = []

    def run(images: Tensor) -> dict[str, Tensor]:
        batches.append(len(images))
        value = images.float().mean((1, 2, 3))
        return {"both": torch.stack([value, value**2], 1)}

    return Extractor(name, {"both": 2}, run, "none", sha256, True), batches


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1), (7, 100)])
def test_every_image_is_read_once_in_order_the_last_batch_too(count: int, batch_size: int) -> None:
    images, (extractor, batches) = Numbered(count), mean_extractor()
    rows = extract_rows([Reading("mean", extractor, images)], Extraction(batch_size, CPU))
    assert rows["mean.both"][:, 0].tolist() == list(range(count))
    assert [i for batch in images.reads for i in batch] == list(range(count))
    assert sum(batches) == count
    assert max(batches) <= batch_size


def test_one_pass_serves_all_extractors_and_views() -> None:
    images, smaller = Numbered(10), Numbered(10)
    first, second, third = (mean_extractor(name)[0] for name in ("a", "b", "c"))
    readings = [Reading("a", first, images), Reading("b", second, images), Reading("c@small", third, smaller)]
    rows = extract_rows(readings, Extraction(4, CPU))
    assert [len(batch) for batch in images.reads] == [len(batch) for batch in smaller.reads] == [4, 4, 2]
    assert rows["a.both"][:, 0].tolist() == rows["c@small.both"][:, 0].tolist() == list(range(10))


def test_prompts_are_those_of_their_images_and_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_TEXTS", 3)
    asked: list[list[str]] = []

    def encode(prompts: Sequence[str]) -> Tensor:
        asked.append(list(prompts))
        return torch.tensor([[float(prompt)] * 2 for prompt in prompts]).reshape(-1, 2)

    wanted = [5, 3, 5, 0, 1, 2, 4, 3, 6, 5]
    rows = extract_texts([str(number) for number in wanted], encode, device=CPU)
    assert rows.tolist() == [[number] * 2 for number in wanted]
    assert asked == [["5", "3", "0"], ["1", "2", "4"], ["6"]]


def test_moments_are_those_of_the_rows() -> None:
    reading = Reading("mean", mean_extractor()[0], Numbered(50))
    moments = extract_moments([reading], Extraction(7, CPU))["mean.both"]
    rows = extract_rows([reading], Extraction(7, CPU))["mean.both"].double()
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(rows.T))
    assert moments.count == 50


def test_shares_of_processes_are_whole_batches_and_everything() -> None:
    """A network's features depend in their last bits on the batch: processes must see the batches that one would."""
    for count, batch_size, processes in [(10, 4, 2), (64, 4, 3), (5, 4, 4), (1, 8, 2), (100, 7, 8)]:
        bounds = [features._bounds(count, batch_size, rank, processes) for rank in range(processes)]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == count
        assert all(end == start for (_, end), (start, _) in pairwise(bounds))
        assert all(start % batch_size == 0 or start == count for start, _ in bounds)


def test_rows_are_kept_by_content_extractor_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path))
    extractor, batches = mean_extractor()
    first = cached_rows([Reading("mean", extractor, Numbered(9, "x"))], Extraction(4, CPU, ""))
    assert cached_rows([Reading("mean", extractor, Numbered(9, "x"))], Extraction(4, CPU, "")).keys() == first.keys()
    assert len(batches) == 3
    again = cached_rows([Reading("mean@view", extractor, Numbered(9, "x"))], Extraction(4, CPU, ""))
    torch.testing.assert_close(again["mean@view.both"], first["mean.both"])
    assert len(batches) == 3
    for images, other, batch_size in [
        (Numbered(9, "y"), extractor, 4),
        (Numbered(8, "x"), extractor, 4),
        (Numbered(9, "x"), mean_extractor(sha256="b")[0], 4),
        (Numbered(9, "x"), extractor, 3),
        (Numbered(9, None), extractor, 4),
    ]:
        cached_rows([Reading("mean", other, images)], Extraction(batch_size, CPU, ""))
        assert images.reads


def test_moments_are_kept_beside_rows_of_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path))
    extractor, batches = mean_extractor()
    reading = Reading("mean", extractor, Numbered(50, "x"))
    extraction = Extraction(7, CPU, "")
    cached_rows([reading], extraction)
    first = cached_moments([reading], extraction)["mean.both"]
    assert len(batches) == 2 * 8
    again = cached_moments([reading], extraction)["mean.both"]
    cached_rows([reading], extraction)
    assert len(batches) == 2 * 8
    plain = extract_moments([reading], extraction)["mean.both"]
    for kept in (first, again):
        assert kept.count == plain.count == 50
        torch.testing.assert_close(kept.mean, plain.mean, rtol=0, atol=0)
        torch.testing.assert_close(kept.covariance, plain.covariance, rtol=1e-14, atol=0)
    assert torch.equal(first.covariance, again.covariance)


def test_a_damaged_or_unwritable_cache_costs_a_warning_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    reading = Reading("mean", mean_extractor()[0], Numbered(5, "x"))
    extraction = Extraction(4, CPU, "")
    expected = cached_rows([reading], extraction)
    (file,) = (tmp_path / "cache" / "features").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    torch.testing.assert_close(cached_rows([reading], extraction), expected)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set FDISTILL_CACHE"):
        torch.testing.assert_close(cached_rows([reading], extraction), expected)


def test_reading_and_extracting_overlap() -> None:
    running = {"read": 0, "extract": 0, "both": 0}

    def busy(what: str, other: str) -> None:
        running[what] = 1
        for _ in range(20):
            time.sleep(0.002)
            running["both"] += running[other]
        running[what] = 0

    class Slow(Numbered):
        def read(self, indices: Sequence[int]) -> Tensor:
            busy("read", "extract")
            return super().read(indices)

    def run(images: Tensor) -> dict[str, Tensor]:
        busy("extract", "read")
        return {"x": torch.zeros(len(images), 1)}

    extract_rows([Reading("e", Extractor("e", {"x": 1}, run, "", "", True), Slow(12))], Extraction(2, CPU))
    assert running["both"] > 20


def test_an_error_in_the_reading_thread_is_raised_and_ends_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    found: list[int] = []
    with pytest.raises(ValueError, match="no more"):
        found.extend(ahead(items()))
    assert found == [1]
    before = threading.active_count()
    stream = ahead(iter(range(1000)))
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before

"""A kind of data set is one file and one row: the worked example of docs/extending.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.evaluate import evaluate
from evaluation.images import open_images
from fdistill import data, distill
from fdistill.base.errors import ArgumentError, DataError
from fdistill.base.files import weights_sha256
from fdistill.commands.inspect import inspect
from fdistill.data import open_source
from fdistill.data.digit_captions import load_digit_images
from fdistill.data.digits import load_digits
from fdistill.data.source import ArraySource, Encoded, Kind
from fdistill.training.cache import cache
from fdistill.training.journal import read_records
from support.extending import blocks, run
from support.families import dit


@pytest.fixture
def _added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's file and row, taken away again."""
    rows = list(data.STORED)
    monkeypatch.syspath_prepend(tmp_path)
    for code in blocks("A data source"):
        run(code, tmp_path)
    yield
    data.STORED[:] = rows
    sys.modules.pop("csv_rows", None)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The first digits as rows of text."""
    images, labels = load_digits()
    rows = torch.cat([labels[:, None], images.flatten(1).long()], dim=1)[:64]
    np.savetxt(tmp_path / "digits.csv", rows.numpy(), fmt="%d", delimiter=",")
    return tmp_path / "digits.csv"


@pytest.mark.usefixtures("_added")
def test_a_new_kind_is_opened_and_distilled_from(table: Path, tmp_path: Path) -> None:
    images, labels = load_digits()
    source = open_source(str(table))
    assert isinstance(source, ArraySource)
    assert torch.equal(source.images, images[:64])
    assert torch.equal(source.labels, labels[:64])
    assert source.num_classes == 10
    settings = {"iterations": 1, "batch_size": 8, "log.every": 1, "log.samples_every": 0, "log.tracker": "none"}
    students = [
        distill("digits", output=tmp_path / name, data=where, **settings)
        for name, where in (("from-csv", str(table)), ("from-digits", "digits"))
    ]
    first, second = (load_file(next(folder.rglob("*.safetensors"))) for folder in students)
    assert read_records(tmp_path / "from-csv" / "metrics.jsonl")[-1]["iteration"] == 1
    assert any(not torch.equal(first[name], second[name]) for name in first)  # the discriminator saw other images


@pytest.mark.usefixtures("_added")
@pytest.mark.filterwarnings("ignore:.*names show the count")
@pytest.mark.thorough
def test_a_new_kind_is_evaluated_inspected_and_cached(table: Path, tmp_path: Path) -> None:
    images, labels = load_digits()
    np.savez(tmp_path / "digits.npz", images=images[:64, 0].numpy(), labels=labels[:64].numpy())
    teacher = dit(tmp_path / "teacher")
    results = []
    for number, where in enumerate((table, tmp_path / "digits.npz")):
        scores = evaluate(where, metrics=["class_accuracy"])["metrics"]
        folder = cache(where, teacher=teacher, output=tmp_path / f"latents{number}", workers=1)
        results.append((scores, inspect("digits", data=str(where))[1], weights_sha256(folder)))
    assert results[0] == results[1]
    with pytest.raises(ArgumentError, match="no such file; expected images"):
        evaluate(tmp_path / "missing.csv")


class _Pixels:
    """A source that is no `ArraySource` and gives pixels."""

    def __init__(self, images: torch.Tensor):
        self.name, self.labels, self.num_classes, self.captions = "pixels", torch.zeros(len(images)).long(), None, None
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def item_name(self, index: int) -> str:
        return f"image {index}"

    def encoded(self, index: int) -> Encoded:
        pixels: Encoded = self._images[index].permute(1, 2, 0).squeeze(2).numpy()
        return pixels


def test_sources_that_give_pixels_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for images in (load_digits()[0][:5], load_digit_images()[0][:5]):
        kind = Kind("pixels", lambda where: where == "pixels:", lambda where, images=images: _Pixels(images))
        monkeypatch.setattr(data, "STORED", [kind])
        found = open_images("pixels:", channels=images.shape[1])
        assert torch.equal(found.read(range(5)), images)
        assert found.sha256() is not None


@pytest.mark.usefixtures("_added")
def test_messages_know_the_new_kind(tmp_path: Path) -> None:
    for text, says in (("1,300\n", "expected a class and H x H of 0 to 255"), ("a,b\n", "cannot be read")):
        (tmp_path / "wrong.csv").write_text(text)
        with pytest.raises(DataError, match=says):
            open_source(str(tmp_path / "wrong.csv"))
    (tmp_path / "strange.xyz").touch()
    with pytest.raises(DataError, match=r"a file of unknown kind; expected a folder, .*\.npz or \.csv"):
        open_source(str(tmp_path / "strange.xyz"))


def test_without_its_row_it_is_unknown(table: Path) -> None:
    with pytest.raises(DataError, match="a file of unknown kind"):
        open_source(str(table))

"""The registry of kinds of data sets: which row opens what, and what no row or two rows recognise."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.evaluate import holds_images
from fdistill import data
from fdistill.base.errors import ArgumentError, ConfigError, DataError
from fdistill.data import EMBEDDED, STORED, Kind, is_embedded, load_data, looks_stored, open_source


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    return path


def saved(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def edm(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"labels": null}')


def cifar10(folder: Path) -> None:
    (folder / "data_batch_1").touch()


def tar(folder: Path) -> None:
    with tarfile.open(folder / "x.tar", "w") as archive:
        archive.add(image(folder.parent / "1.png"), "1.png")


def parquet(folder: Path) -> None:
    (folder / "x.parquet").touch()


#: What puts a kind of data into a folder, in the order of the registry -> what messages call it.
IN_FOLDERS: dict[Callable[[Path], None], str] = {
    saved: "a saved data set",
    edm: "a dataset.json",
    cifar10: "CIFAR-10",
    tar: "tar files",
    parquet: "parquet files",
}


def test_every_file_that_reads_a_kind_of_data_has_its_rows() -> None:
    modules = [
        importlib.import_module(f"fdistill.data.{module.name}") for module in pkgutil.iter_modules(data.__path__)
    ]
    kinds = [value for module in modules for value in vars(module).values() if isinstance(value, Kind)]
    assert {id(kind) for kind in kinds} == {id(kind) for kind in [*EMBEDDED, *STORED]}
    assert len({kind.name for kind in kinds}) == len(EMBEDDED) + len(STORED)


@pytest.mark.parametrize("put", IN_FOLDERS, ids=lambda put: put.__name__)
def test_a_folder_is_recognised_by_one_row(put: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    assert [kind for kind in STORED if kind.recognises(str(folder))] == []
    put(folder)
    assert [kind.name for kind in STORED if kind.recognises(str(folder))] == [IN_FOLDERS[put]]


@pytest.mark.parametrize(("first", "second"), itertools.combinations(IN_FOLDERS, 2))
def test_two_kinds_in_one_folder_are_refused(
    first: Callable[[Path], None], second: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    second(folder)
    first(folder)
    with pytest.raises(DataError) as caught:
        open_source(str(folder))
    kinds = f"{IN_FOLDERS[first]} and {IN_FOLDERS[second]}"
    assert str(caught.value) == f"data {folder}: holds {kinds}; expected one kind of data in a folder"


def test_names_of_the_package_win_over_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    tar(tmp_path / "digits")
    edm(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits")) == 1797
    captioned = open_source("digit-captions")
    assert captioned.captions is not None
    assert len(captioned) == len(captioned.captions) == 1797
    assert is_embedded("digit-captions")
    assert not is_embedded("./digits")
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_data("digit")


def test_a_file_is_of_the_kind_that_its_name_says(tmp_path: Path) -> None:
    names = {
        "x.zip": "a dataset.json",
        "cifar-10-python.tar.gz": "CIFAR-10",
        "x.tar": "tar files",
        "x.parquet": "parquet files",
        "x.npz": "an .npz file",
    }
    for name, kind in names.items():
        assert not any(row.recognises(str(tmp_path / name)) for row in STORED), name  # before it is there
        assert looks_stored(str(tmp_path / name))
        (tmp_path / name).touch()
        assert [row.name for row in STORED if row.recognises(str(tmp_path / name))] == [kind]
        assert holds_images(tmp_path / name)
    for where, kind in {"hf:owner/name": "a data set of the hub", "shards/a-{00..09}.tar": "tar files"}.items():
        assert [row.name for row in STORED if row.recognises(where)] == [kind]
        assert holds_images(where)
    (tmp_path / "x.xyz").touch()
    says = r"a folder, hf:owner/name, \.zip, CIFAR-10's \.tar\.gz, \.tar, \.parquet or \.npz"
    with pytest.raises(DataError, match=f"a file of unknown kind; expected {says}$"):
        open_source(str(tmp_path / "x.xyz"))
    with pytest.raises(
        ArgumentError, match=rf"a file of another kind; expected images \({says}\), or the folder or hub"
    ):
        holds_images(tmp_path / "x.xyz")


@pytest.mark.parametrize("put", IN_FOLDERS)
def test_evaluation_finds_images_wherever_a_row_does(put: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    put(tmp_path / "set")
    assert holds_images(tmp_path / "set")
    (tmp_path / "set" / "model_index.json").write_text("{}")  # a pipeline, which makes images
    assert not holds_images(tmp_path / "set")

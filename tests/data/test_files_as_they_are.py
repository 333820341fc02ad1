"""Folders and archives as people have them: numbers as names, links, junk, damage. Nothing goes wrong in silence."""

from __future__ import annotations

import io
import json
import os
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdistill.base.errors import DataError
from fdistill.data import Batching, ImageLoader, open_source
from fdistill.data.account import account_of
from fdistill.data.recipes import open_image
from fdistill.data.source import Source
from support.files import png, put, zipped


def folders(root: Path, names: list[str]) -> Path:
    """One image in each class folder, whose grey is the folder's place in the list."""
    for place, name in enumerate(names):
        put(root / name / "x.png", png(place))
    return root


def greys(source: Source) -> list[int]:
    return [int(np.asarray(open_image(source.encoded(row))).max()) for row in range(len(source))]


def read(where: Path) -> tuple[list[int], list[int], str]:
    """(labels, greys, account) of a data set."""
    source = open_source(str(where))
    return source.labels.tolist(), greys(source), account_of(source).sentence()


@pytest.mark.parametrize("width", [1, 2, 5])
def test_class_folders_that_are_numbers_are_their_own_ids(width: int, tmp_path: Path) -> None:
    folder = folders(tmp_path / "set", [str(number).zfill(width) for number in range(12)])
    for where in (folder, zipped(folder, tmp_path / "set.zip"), zipped(folder, tmp_path / "in.zip", under="a/b/")):
        labels, seen, sentence = read(where)
        assert labels == seen  # sorted as text, 10 would be class 2
        assert sorted(labels) == list(range(12))
        assert sentence == f"12 images in 12 classes ({'0'.zfill(width)} -> 0 ... {'11'.zfill(width)} -> 11)"


def test_other_names_of_classes_are_sorted_as_text(tmp_path: Path) -> None:
    names = ["B", "a 1", "a.10", "a.2", "é", "家"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels, seen, _ = read(folders(tmp_path / "words", names))
        assert labels == seen
        assert read(folders(tmp_path / "one", ["a"]))[2] == "1 image in 1 class (a -> 0)"


@pytest.mark.parametrize("names", [["1", "2", "10"], ["0", "2", "3"], ["007", "9", "1000"]])
def test_numbers_that_are_no_ids_are_told(names: list[str], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"numbered {names[0]} to {names[2]}, which are not 0 to 2; class ids are"):
        labels, seen, _ = read(folders(tmp_path / "set", names))
    assert labels == seen
    pairs = [[f"{name}/x.png", place + 7] for place, name in enumerate(names)]  # as the warning advises
    put(tmp_path / "set" / "dataset.json", json.dumps({"labels": pairs}))
    assert sorted(open_source(str(tmp_path / "set")).labels.tolist()) == [7, 8, 9]


@pytest.mark.parametrize("names", [["1", "01"], ["caf\u00e9", "cafe\u0301"]])
def test_one_class_in_two_spellings_is_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are one class, spelt in two ways; merge them"):
        open_source(str(folders(tmp_path, names)))


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "WEBP"):
            buffer = io.BytesIO()
            Image.fromarray(np.stack([pixels] * 3, -1)).save(buffer, kind, exif=exif, lossless=True)
            image = open_image(buffer.getvalue())
            turned = np.asarray(image)[..., 0]
            upright = {
                1: pixels,
                2: pixels[:, ::-1],
                3: pixels[::-1, ::-1],
                4: pixels[::-1],
                5: pixels.T,
                6: pixels.T[:, ::-1],
                7: pixels.T[::-1, ::-1],
                8: pixels.T[::-1],
            }[orientation]
            assert np.array_equal(turned, upright), (orientation, kind)
            put(tmp_path / kind / f"{orientation}.png", buffer.getvalue())
    with ImageLoader(open_source(str(tmp_path / "PNG")), (3, 4, 4), Batching(8, 0), recipe="squash") as loader:
        assert len(next(loader).images) == 8


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in (
        "a.png",
        "b.JPG",
        "c.tif",
        "d.gif",
        "e.jfif",
        "f.TIFF",
        ".hidden.png",
        "Thumbs.db",
        "notes.md",
        "x.txt",
    ):
        put(folder / name, png())
    put(folder / "a.txt", "a caption")
    put(tmp_path / "other" / "1.png", png())
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    source = open_source(str(folder))
    assert source.files == ["a.png", "b.JPG"]  # type: ignore[attr-defined]
    account = account_of(source)
    parts = [
        "2 hidden or system files (.hidden.png, Thumbs.db)",
        "4 images of formats that are not read (.gif, .jfif, .tif, ...)",
        "1 linked folder (linked)",
        "2 links that lead nowhere, pipes or devices (gone.png, pipe.png)",
        "2 files that are no images (notes.md, x.txt)",
    ]
    sentence = account.sentence()
    assert sentence.startswith("2 images; left out: ")
    for part in parts:
        assert part in sentence
    assert account.facts()["left_out"]["images of formats that are not read"] == {
        "count": 4,
        "names": ["c.tif", "d.gif", "e.jfif", "f.TIFF"],
    }
    for name in ("a.png", "b.JPG"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"no images in this folder, but .*4 images of formats that are not read"):
        open_source(str(folder))


def layouts(tmp: Path) -> dict[str, Path]:
    """Folders of every layout: classes, flat with captions, EDM's, generated."""
    for place in range(12):
        put(tmp / "classes" / str(place) / f"{place}.png", png(place))
        put(tmp / "flat" / f"{place}.png", png(place))
        put(tmp / "flat" / f"{place}.txt", f"grey {place}")
        put(tmp / "listed" / "sub" / f"{place}.png", png(place))
        put(tmp / "edm" / f"0000{place % 2}" / f"{place}.png", png(place))
    rows = [{"file_name": f"sub/{place}.png", "text": f"grey {place}"} for place in range(12)]
    put(tmp / "listed" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    labels = [[f"0000{place % 2}/{place}.png", place] for place in range(12)]
    put(tmp / "edm" / "dataset.json", json.dumps({"labels": labels}))
    for name in ("classes", "flat", "listed", "edm"):
        put(tmp / name / ".ipynb_checkpoints" / "0-checkpoint.png", png(200))
        put(tmp / name / "__MACOSX" / "._0.png", b"")
        put(tmp / name / "README.md", "about")
    return {name: tmp / name for name in ("classes", "flat", "listed", "edm")}


@pytest.mark.parametrize("under", ["", "photos/"])
@pytest.mark.parametrize("layout", ["classes", "flat", "listed", "edm"])
def test_a_zip_is_its_folder(layout: str, under: str, tmp_path: Path) -> None:
    folder = layouts(tmp_path)[layout]
    source = open_source(str(folder))
    packed = open_source(str(zipped(folder, tmp_path / "x.ZIP", under=under)))
    assert greys(packed) == greys(source)
    assert packed.labels.tolist() == source.labels.tolist()
    assert packed.num_classes == source.num_classes
    assert packed.captions == source.captions
    assert account_of(packed).classes == account_of(source).classes
    assert packed.item_name(3) == source.item_name(3)
    if layout != "listed" or not under:  # where all lies in one folder, it is no class
        assert len(source) == 12
    assert "README.md" in account_of(packed).sentence()


def test_names_in_zips_that_windows_wrote(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a" / "1.png", png(1))
    put(tmp_path / "set" / "b" / "2.png", png(2))
    path = zipped(tmp_path / "set", tmp_path / "x.zip")
    path.write_bytes(path.read_bytes().replace(b"a/1.png", b"a\\1.png").replace(b"b/2.png", b"b\\2.png"))
    assert read(path)[:2] == ([0, 1], [1, 2])


ODD = [
    "a b.png",
    ".x.y.png"[1:],
    "dots...png",
    "007.png",
    "UPPER.JPG",
    "né.png",
    "家.png",
    "x" * 200 + ".png",
    "a\nb.png",
]


def test_names_that_people_use(tmp_path: Path) -> None:
    for place, name in enumerate(ODD):
        put(tmp_path / "set" / name, png(place))
        put(tmp_path / "set" / (name.rpartition(".")[0] + ".txt"), f"caption {place}")
    raw = os.fsencode(tmp_path / "set") + b"/\xff.png"
    Path(os.fsdecode(raw)).write_bytes(png(len(ODD)))
    Path(os.fsdecode(raw[:-4] + b".txt")).write_bytes(f"caption {len(ODD)}".encode())
    for junk in ("Thumbs.db", "desktop.ini", ".DS_Store", "._007.png", "@eaDir/007.png/SYNOPHOTO_THUMB_XL.jpg"):
        put(tmp_path / "set" / junk, b"junk")
    source = open_source(str(tmp_path / "set"))
    assert sorted(greys(source)) == list(range(len(ODD) + 1))
    assert source.captions == [f"caption {grey}" for grey in greys(source)]
    names = [source.item_name(row) for row in range(len(source))]
    assert all(name.isprintable() and name.encode() for name in [*names, account_of(source).sentence()])
    assert account_of(source).left_out.keys() == {("hidden or system file", "hidden or system files")}


@pytest.mark.parametrize(("on_disk", "written"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_are_one_name_in_both_spellings(on_disk: str, written: str, tmp_path: Path) -> None:
    def spelt(form: str, name: str) -> str:
        return unicodedata.normalize(form, name)  # type: ignore[arg-type]

    for place, name in enumerate(["café", "naïve"]):
        put(tmp_path / "list" / spelt(on_disk, f"{name}.png"), png(place))
        put(tmp_path / "edm" / spelt(on_disk, f"{name}.png"), png(place))
        put(tmp_path / "beside" / spelt(on_disk, f"{name}.png"), png(place))
        put(tmp_path / "beside" / spelt(written, f"{name}.txt"), name)
    rows = [{"file_name": spelt(written, f"{name}.png"), "text": name} for name in ("café", "naïve")]
    put(tmp_path / "list" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    labels = [[spelt(written, f"{name}.png"), place] for place, name in enumerate(["café", "naïve"])]
    put(tmp_path / "edm" / "dataset.json", json.dumps({"labels": labels}))
    for name in ("list", "beside"):
        source = open_source(str(tmp_path / name))
        assert [["café", "naïve"][grey] for grey in greys(source)] == source.captions
    assert greys(open_source(str(tmp_path / "edm"))) == open_source(str(tmp_path / "edm")).labels.tolist()


def test_files_beside_shards_are_counted(tmp_path: Path) -> None:
    import tarfile

    put(tmp_path / "1.png", png())
    with tarfile.open(tmp_path / "x.TAR", "w") as archive:
        archive.add(tmp_path / "1.png", "1.png")
        archive.add(tmp_path / "1.png", "2.tif")
        archive.add(tmp_path / "1.png", ".ipynb_checkpoints/1-checkpoint.png")
    put(tmp_path / "._x.tar", b"junk of macOS")
    source = open_source(str(tmp_path))
    assert len(source) == 1
    assert account_of(source).sentence() == (
        "1 image; left out: 1 image beside the files that are read (1.png), 1 image of a format that is not read (.tif)"
    )


def test_a_hundred_thousand_files_take_seconds(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        for place in range(250):
            os.close(os.open(tmp_path / str(number) / f"{place}.png", os.O_CREAT | os.O_WRONLY))
    before = time.process_time()
    source = open_source(str(tmp_path))
    _ = source.captions
    sentence = account_of(source).sentence()
    seconds = time.process_time() - before
    assert sentence == "5,000 images in 20 classes (0 -> 0 ... 19 -> 19)"
    assert seconds < 0.5  # so that 100,000 take less than ten


def test_manifests_of_generated_images_are_left_out_without_a_word(tmp_path: Path) -> None:
    for name in ("0", "1"):
        put(tmp_path / "photos" / name / "000000.png", png())
        put(tmp_path / "photos" / name / "manifest.json", "{}")
    assert account_of(open_source(str(tmp_path / "photos"))).sentence() == "2 images in 2 classes (0 -> 0 ... 1 -> 1)"

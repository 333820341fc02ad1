"""Folders and archives as people have them: numbers as names, links, junk, damage. Nothing goes wrong in silence."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import tracemalloc
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdistill.base.errors import DataError
from fdistill.data import Batching, ImageLoader, open_source
from fdistill.data.account import account_of
from fdistill.data.prompts import read_prompts
from fdistill.data.recipes import open_image
from fdistill.data.source import Source
from support.files import patched, png, put, zipped


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


def damaged_zips(tmp: Path) -> dict[str, tuple[Path, str]]:
    """{what is wrong: (archive, what opening it says)}"""
    put(tmp / "set" / "1.png", png(1))
    put(tmp / "set" / "2.png", png(2))

    def path(name: str) -> Path:
        return zipped(tmp / "set", tmp / f"{name}.zip")

    twice = path("twice")
    twice.write_bytes(twice.read_bytes().replace(b"2.png", b"1.png"))
    return {
        "encrypted": (
            patched(path("encrypted"), "2.png", local=6, central=8, value=b"\x01\x00"),
            r"2\.png is encrypted; unpack the archive with its password, and pass the folder",
        ),
        "Deflate64": (
            patched(path("deflate64"), "2.png", local=8, central=10, value=b"\x09\x00"),
            r"2\.png is packed by method 9, such as Deflate64.*unpack the archive and pass the folder",
        ),
        "twice": (twice, r"two members are called 1\.png; pack the files again"),
    }


@pytest.mark.parametrize("damage", ["encrypted", "Deflate64", "twice"])
def test_zips_that_cannot_be_unpacked_say_so_at_once(damage: str, tmp_path: Path) -> None:
    path, says = damaged_zips(tmp_path)[damage]
    with pytest.raises(DataError, match=says) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_member_counts_as_a_damaged_image(tmp_path: Path) -> None:
    for number in range(200):
        put(tmp_path / "set" / f"{number:03d}.png", png(number % 256))
    path = zipped(tmp_path / "set", tmp_path / "x.zip")
    patched(path, "007.png", local=60, value=b"\xff\xff")
    patched(path, "008.png", central=24, value=struct.pack("<I", 1 << 31))  # says that it has 2 GB
    with ImageLoader(open_source(str(path)), (3, 4, 4), Batching(200, 0)) as loader:
        next(loader)
        assert sorted(name for name, _ in loader.skipped) == ["007.png", "008.png"]
        assert any("Bad CRC" in reason for _, reason in loader.skipped)
        assert any("has 2,147,483,648 bytes unpacked; expected at most" in reason for _, reason in loader.skipped)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_with_a_flipped_byte(save: Callable[..., None], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", images=images, labels=np.zeros(4, np.int64))
    content = (tmp_path / "x.npz").read_bytes()
    for place in range(150, 400, 10):
        (tmp_path / "y.npz").write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"y\.npz, array 'images': cannot be read as plain arrays") as caught:
            open_source(str(tmp_path / "y.npz"))
        assert "\n" not in str(caught.value)


def test_an_npz_that_says_it_is_huge(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((1000, 8, 8, 3), np.uint8))
    content = (tmp_path / "x.npz").read_bytes()
    huge = content.replace(b"(1000, 8, 8, 3), }", b"(9999999999, 3), }")
    (tmp_path / "y.npz").write_bytes(_with_right_checksum(huge))
    with pytest.raises(DataError, match=r"says uint8 \[9999999999, 3\], 29,999,999,997 bytes, and has"):
        open_source(str(tmp_path / "y.npz"))


def _with_right_checksum(content: bytes) -> bytes:
    """An npz of one stored member, whose headers get the checksum of what is in it."""
    made = bytearray(content)
    names = int.from_bytes(made[26:28], "little") + int.from_bytes(made[28:30], "little")
    begin, end = 30 + names, made.index(b"PK\x01\x02")
    crc = struct.pack("<I", zlib.crc32(made[begin:end]))
    made[14:18] = crc
    made[end + 16 : end + 20] = crc
    return bytes(made)


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
def test_hostile_images_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    """A pipe, a device, a picture that is a gigabyte, a thin one that a recipe would make a gigabyte, a vast file."""
    for number in range(300):
        put(tmp_path / f"{number:03d}.png", png(number % 256))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    put(tmp_path / "wide.png", huge_png(13_000, 13_000))
    put(tmp_path / "wider.png", huge_png(60_000, 60_000))
    with put(tmp_path / "vast.png").open("wb") as file:
        file.truncate(1 << 33)  # a hole
    tracemalloc.start()
    try:
        before = time.monotonic()
        source = open_source(str(tmp_path))
        for row in range(len(source)):
            if source.item_name(row) in ("wide.png", "wider.png", "vast.png"):
                with pytest.raises((ValueError, Image.DecompressionBombError)):
                    open_image(source.encoded(row))
            else:
                open_image(source.encoded(row))
        assert time.monotonic() - before < 10
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert "3 links that lead nowhere, pipes or devices (loop.png, pipe.png, zero.png)" in account_of(source).sentence()
    thin = tmp_path / "thin"
    put(thin / "1.png", png(size=(60_000, 1)))
    with (
        ImageLoader(open_source(str(thin)), (3, 64, 64), Batching(1, 0), recipe="adm") as loader,
        pytest.raises(DataError, match=r"1\.png 3840000x64 are more than 89,478,485 pixels"),
    ):
        next(loader)


def test_links_to_text_outside_are_not_read(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.txt", "a secret")
    listed = put(tmp_path / "secret.jsonl", '{"file_name": "1.png", "text": "a secret"}')
    put(tmp_path / "a" / "1.png", png())
    put(tmp_path / "b" / "1.png", png())
    put(tmp_path / "c" / "1.png", png())
    put(tmp_path / "c" / "sub" / "same.txt", "inside")
    (tmp_path / "a" / "1.txt").symlink_to(secret)
    (tmp_path / "b" / "metadata.jsonl").symlink_to(listed)
    (tmp_path / "c" / "1.txt").symlink_to("sub/same.txt")
    for name in ("a", "b"):
        with pytest.raises(
            DataError, match=r"is a link that leads out of the folder.*put the file itself in its place"
        ):
            _ = open_source(str(tmp_path / name)).captions
    (tmp_path / "linked.png").symlink_to(tmp_path / "a" / "1.png")  # images may be linked: only a picture is seen of it
    assert len(open_source(str(tmp_path / "c"))) == 1


def test_deep_json_is_told_in_one_line(tmp_path: Path) -> None:
    deep = '{"labels": ' + "[" * 100_000
    put(tmp_path / "a" / "1.png", png())
    put(tmp_path / "a" / "dataset.json", deep)
    put(tmp_path / "b" / "1.png", png())
    put(tmp_path / "b" / "metadata.jsonl", deep)
    with pytest.raises(DataError, match=r"dataset\.json: expected"):
        open_source(str(tmp_path / "a"))
    with pytest.raises(DataError, match="line 1 is not JSON"):
        _ = open_source(str(tmp_path / "b")).captions


def test_pipes_and_devices_are_no_lists_of_prompts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(DataError, match=r"cannot be read \(is a pipe or a device; expected a file\)"):
            read_prompts(tmp_path / name)


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

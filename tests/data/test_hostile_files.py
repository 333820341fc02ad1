"""Damaged and encrypted archives, files that never end or are vast, text from elsewhere: one line, little memory."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import tarfile
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.images import open_images
from fdistill.base.errors import DataError, FDistillError
from fdistill.commands.ending import quiet_libraries
from fdistill.data import Batching, ImageLoader, open_source
from fdistill.data.account import account_of
from fdistill.data.prompts import read_prompts
from fdistill.data.recipes import open_header, open_image
from support.files import patched, png, put, zipped


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
        with pytest.raises(DataError, match=r"is a pipe or a device, which may never end; expected a file of prompts"):
            read_prompts(tmp_path / name)


def test_archives_with_any_bytes_changed_end_in_one_line(tmp_path: Path) -> None:
    """Every archive is read as training and evaluation read it; a fixed seed, 25 copies of each."""
    for number in range(4):
        put(tmp_path / "set" / str(number % 2) / f"{number}.png", png(number))
        put(tmp_path / "set" / str(number % 2) / f"{number}.txt", "a caption")
    arrays = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.zeros(4, np.int64)}
    np.savez(tmp_path / "plain.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(tmp_path / "packed.npz", **arrays)  # type: ignore[arg-type]
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(tmp_path / "set" / "0" / "0.png", "0.png")
        shard.add(tmp_path / "set" / "0" / "0.txt", "0.txt")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as batches:
        for number in range(1, 6):
            batch = put(tmp_path / "batch", (b"".join(bytes([row % 10]) * 7 for row in range(256)) * 12)[: 6 * 3073])
            batches.add(batch, f"cifar-10-batches-bin/data_batch_{number}.bin")
    chosen = random.Random(0)
    archives = [zipped(tmp_path / "set", tmp_path / "set.zip"), tmp_path / "shard.tar", *tmp_path.glob("*z")]
    assert [len(open_source(str(path))) for path in archives if path.suffix == ".gz"] == [30]
    for path in archives:
        whole = path.read_bytes()
        for _ in range(25):
            content = bytearray(whole)
            for _ in range(chosen.choice([1, 2, 10])):
                content[chosen.randrange(len(content))] = chosen.randrange(256)
            path.write_bytes(content[: chosen.choice([len(content), chosen.randrange(len(content))])])
            for see in (_as_training_does, _as_evaluation_does):
                try:
                    see(path)
                except FDistillError as error:
                    assert "\n" not in str(error)  # noqa: PT017


def _as_training_does(path: Path) -> None:
    source = open_source(str(path))
    _ = source.captions
    for row in range(len(source)):
        with contextlib.suppress(ValueError, OSError):  # counted as an image that cannot be decoded
            source.encoded(row)


def _as_evaluation_does(path: Path) -> None:
    images = open_images(path, channels=3)
    images.sha256()
    images.read(range(len(images)))


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_huge_images_are_refused_in_our_words(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns of the first, and raises an error of its own for the second."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, format="BMP")
    data = bytearray(file.getvalue())
    data[18:26] = struct.pack("<II", side, side)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        with pytest.raises(ValueError, match="more than 89,478,485 pixels; make it smaller"):
            open_header(bytes(data))
    assert not shown

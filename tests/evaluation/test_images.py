"""Images to measure: every one, in the order of their names, bit for bit; what would change a score is refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.images import Images, open_images
from evaluation.preparation import Preparation, prepared, threads_for
from fdistill import generate
from fdistill.base.errors import ArgumentError, DataError
from fdistill.base.images import to_uint8
from fdistill.data.digit_captions import load_captioned_digits
from fdistill.data.digits import load_digits

COUNT = 13
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 10, 8, 3), dtype=np.uint8)
LABELS = [0] * 4 + [1] * 3 + [2] * 6


def tensor(pixels: np.ndarray = PIXELS) -> Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def encoded(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder_of(
    folder: Path, pixels: np.ndarray = PIXELS, suffix: str = "png", kind: str = "PNG", **options: Any
) -> Path:
    """Written last to first, so that the file system's own order is another than that of the names."""
    folder.mkdir(parents=True)
    for number in reversed(range(len(pixels))):
        (folder / f"{number:06d}.{suffix}").write_bytes(encoded(pixels[number], kind, **options))
    return folder


def everything(images: Images, batch_size: int = 5) -> Tensor:
    parts = [range(len(images))[first : first + batch_size] for first in range(0, len(images), batch_size)]
    return torch.cat([images.read(part) for part in parts])


def class_folder(tmp: Path) -> Path:
    for number in reversed(range(COUNT)):
        path = tmp / "classes" / f"class-{LABELS[number]}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(PIXELS[number]))
    return tmp / "classes"


def edm_zip(tmp: Path) -> Path:
    names = [f"{number:03d}.png" for number in range(COUNT)]
    with zipfile.ZipFile(tmp / "set.zip", "w") as archive:
        for number in reversed(range(COUNT)):
            archive.writestr(names[number], encoded(PIXELS[number]))
        labels = [list(pair) for pair in zip(names, LABELS, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return tmp / "set.zip"


def tar(tmp: Path) -> Path:
    with tarfile.open(tmp / "set.tar", "w") as archive:
        for number in range(COUNT):
            for suffix, content in (("png", encoded(PIXELS[number])), ("cls", str(LABELS[number]).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return tmp / "set.tar"


def saved(name: str, save: Callable[..., None], **arrays: Any) -> Callable[[Path], Path]:
    def write(tmp: Path) -> Path:
        save(tmp / f"{name}.npz", **arrays)
        return tmp / f"{name}.npz"

    return write


FORMS: dict[str, Callable[[Path], Path]] = {
    "class folder": class_folder,
    "zip": edm_zip,
    "tar": tar,
    "npz": saved("plain", np.savez, arr_0=PIXELS, arr_1=np.array(LABELS)),
    "npz, named": saved("named", np.savez, images=PIXELS, y=np.array(LABELS), other=np.zeros(3)),
    "npz, compressed": saved("compressed", np.savez_compressed, images=PIXELS, labels=np.array(LABELS)),
    "npz, channels first": saved("first", np.savez, arr_0=PIXELS.transpose(0, 3, 1, 2).copy(), arr_1=np.array(LABELS)),
    "npz, by columns": saved("columns", np.savez, arr_0=np.asfortranarray(PIXELS), arr_1=np.array(LABELS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_labels(form: str, tmp_path: Path) -> None:
    images = open_images(FORMS[form](tmp_path), channels=3)
    assert len(images) == COUNT
    assert torch.equal(everything(images), tensor())
    assert images.labels is not None
    assert images.labels.tolist() == LABELS
    assert images.prompts is None
    assert images.facts["resolution"] == "8x10"
    few = open_images(FORMS[form](tmp_path / "few" if form == "class folder" else tmp_path), channels=3, max_images=6)
    assert len(few) == 6
    assert few.facts["available"] == COUNT
    assert torch.equal(everything(few), tensor()[:6])
    assert few.labels is not None
    assert few.labels.tolist() == LABELS[:6]


@pytest.mark.parametrize("form", FORMS)
def test_less_than_all_may_be_drawn_evenly(form: str, tmp_path: Path) -> None:
    """Images in files may lie class by class; labels, hashes and messages go with the images that are drawn."""
    drawn = open_images(FORMS[form](tmp_path), channels=3, max_images=6, in_order=False)
    rows = [next(i for i in range(COUNT) if torch.equal(image, tensor()[i])) for image in everything(drawn)]
    assert rows == sorted(set(rows))
    assert len(rows) == 6
    assert rows != list(range(6))
    assert drawn.labels is not None
    assert drawn.labels.tolist() == [LABELS[row] for row in rows]
    (tmp_path / "again").mkdir()
    where = FORMS[form](tmp_path / "again")
    assert open_images(where, channels=3, max_images=6).sha256() != drawn.sha256()
    assert open_images(where, channels=3, max_images=6, in_order=False).sha256() == drawn.sha256()


def test_several_generated_sets_are_no_set(tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        folder_of(tmp_path / name)
        (tmp_path / name / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"its folders student, teacher are sets of images; pass one of these"):
        open_images(tmp_path, channels=3)


@pytest.mark.parametrize(
    ("suffix", "kind", "options"),
    [("png", "PNG", {}), ("PNG", "PNG", {}), ("bmp", "BMP", {}), ("webp", "WEBP", {"lossless": True})],
)
def test_lossless_files_come_bit_for_bit(suffix: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    images = open_images(folder_of(tmp_path / "a", PIXELS, suffix, kind, **options), channels=3)
    assert torch.equal(everything(images), tensor())
    assert images.facts["lossy_files"] == 0
    assert images.labels is None


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "JPEG")])
def test_lossy_files_are_counted_whatever_they_are_called(suffix: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", PIXELS[:9], suffix, kind)
    (folder / "000009.png").write_bytes(encoded(PIXELS[9]))
    for see in (everything, lambda images: images.sha256()):
        images = open_images(folder, channels=3)
        for _ in range(2):
            see(images)
            assert images.facts["lossy_files"] == 9
    with Image.open(folder / f"000003.{suffix}") as image:
        assert torch.equal(images.read([3])[0], torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("form", ["class folder", "zip", "npz", "npz, compressed"])
def test_any_batch_gives_the_same_images(form: str, tmp_path: Path) -> None:
    images = open_images(FORMS[form](tmp_path), channels=3)
    for batch_size in (1, 4, COUNT, 50):
        assert torch.equal(everything(images, batch_size), tensor())
    mixed = images.read([7, 2, 7, 12])
    assert torch.equal(mixed, tensor()[[7, 2, 7, 12]])
    assert mixed.is_contiguous()
    assert mixed.dtype == torch.uint8


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "array"])
def test_threads_keep_the_order(form: str, tmp_path: Path) -> None:
    """At a size that is decoded in threads, by callers in several threads."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    assert threads_for(64, 64) > 1
    if form == "array":
        np.savez(tmp_path / "x.npz", arr_0=pixels)
        where = tmp_path / "x.npz"
    else:
        where = folder_of(tmp_path / "a", pixels, "bmp", "BMP")
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in where.iterdir():
                archive.write(path, path.name)
        where = tmp_path / "a.zip"
    elif form == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as shard:
            for path in sorted(where.iterdir()):
                shard.add(path, path.name)
        where = tmp_path / "a.tar"
    images = open_images(where, channels=3, recipe="center-box", size=64)
    parts = [range(first, first + 20) for first in (0, 5, 10, 20)] * 3
    with ThreadPoolExecutor(4) as pool:
        for part, read in zip(parts, pool.map(images.read, parts), strict=True):
            assert torch.equal(read, tensor(pixels)[list(part)])


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels, rounded."""
    blocks = pixels.reshape(pixels.shape[0] // 2, 2, pixels.shape[1] // 2, 2, -1).astype(np.float64)
    return np.floor(blocks.mean((1, 3)) + 0.5).astype(np.uint8)


def lanczos(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS))


def bicubic_of_quarter(pixels: np.ndarray) -> np.ndarray:
    """36x40: halved twice, as 18 is still twice 8; then 9 becomes 8."""
    image = Image.fromarray(pixels)
    for size in ((20, 18), (10, 9)):
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image.resize((9, 8), Image.Resampling.BICUBIC))[:, :8]


RESIZED: dict[str, tuple[tuple[int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "center-box": ((16, 22), lambda pixels: halved(pixels[:, 3:19])),
    "center-lanczos": ((16, 22), lambda pixels: lanczos(pixels[:, 3:19])),
    "squash": ((16, 22), lanczos),
    "adm": ((36, 40), bicubic_of_quarter),
    "torchvision-lanczos": ((16, 19), lambda pixels: lanczos(pixels[:, 2:18])),  # a margin of 1.5 is 2
    "center-patch": ((10, 11), lambda pixels: pixels[1:9, 2:10]),
    "exact": ((8, 8), lambda pixels: pixels),
}


@pytest.mark.parametrize("recipe", RESIZED)
def test_recipes_resize_as_they_say_in_files_and_in_memory(recipe: str, tmp_path: Path) -> None:
    shape, expected = RESIZED[recipe]
    pixels = np.random.default_rng(2).integers(0, 256, (4, *shape, 3), dtype=np.uint8)
    wanted = tensor(np.stack([expected(image) for image in pixels]))
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    for where in (folder_of(tmp_path / "a", pixels), tmp_path / "a.npz"):
        images = open_images(where, channels=3, recipe=recipe, size=8)
        found = everything(images)
        assert found.shape == (4, 3, 8, 8)
        # Box filters round halves by their own lights.
        assert (found.int() - wanted.int()).abs().max() <= (1 if recipe == "center-box" else 0)
        assert wanted.float().std() > 10
        assert (images.facts["recipe"], images.facts["resolution"]) == (recipe, "8x8")
    assert torch.equal(prepared(tensor(pixels), "x", Preparation(3, recipe, 8)), found)


def test_torchvisions_crop_and_resize(tmp_path: Path) -> None:
    from torchvision.transforms import functional

    pixels = np.random.default_rng(4).integers(0, 256, (3, 57, 44, 3), dtype=np.uint8)
    found = everything(
        open_images(folder_of(tmp_path / "a", pixels), channels=3, recipe="torchvision-lanczos", size=24)
    )
    for image, mine in zip(pixels, found, strict=True):
        cropped = functional.center_crop(Image.fromarray(image), [44, 44])
        theirs = functional.resize(cropped, [24, 24], functional.InterpolationMode.LANCZOS)
        assert torch.equal(functional.pil_to_tensor(theirs), mine)


def test_recipes_are_not_each_other(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (1, 36, 43, 3), dtype=np.uint8)
    folder = folder_of(tmp_path / "a", pixels)
    found = [
        open_images(folder, channels=3, recipe=recipe, size=8).read([0]) for recipe in RESIZED if recipe != "exact"
    ]
    for i, one in enumerate(found):
        assert all((one.int() - other.int()).abs().max() > 5 for other in found[:i])


def test_greyscale_is_expanded_and_counted(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    folder = folder_of(tmp_path / "a", grey)
    np.savez(tmp_path / "a.npz", images=grey)
    wanted = torch.from_numpy(grey)[:, None]
    for where in (folder, tmp_path / "a.npz"):
        images = open_images(where, channels=3)
        assert torch.equal(everything(images), wanted.expand(-1, 3, -1, -1))
        assert everything(images).is_contiguous()
        assert images.facts["greyscale_expanded"] == COUNT
        images = open_images(where, channels=1)
        assert torch.equal(everything(images), wanted)
        assert images.facts["greyscale_expanded"] == 0
    (folder / "000013.png").write_bytes(encoded(PIXELS[0]))
    assert torch.equal(open_images(folder, channels=3).read([13]), tensor()[:1])
    with pytest.raises(DataError, match=r"000013\.png is of mode RGB; expected 8-bit greyscale"):
        open_images(folder, channels=1).read([13])
    with pytest.raises(DataError, match="have 3 channels; expected 1"):
        open_images(saved("colour", np.savez, images=PIXELS)(tmp_path), channels=1)


def test_palettes_and_bits_come_as_they_look(tmp_path: Path) -> None:
    tmp_path = folder_of(tmp_path / "a", PIXELS[:1])
    palette = Image.fromarray(PIXELS[1]).quantize(200)
    bits = Image.fromarray(PIXELS[2, ..., 0] > 99)
    assert (palette.mode, bits.mode) == ("P", "1")
    (tmp_path / "000001.png").write_bytes(encoded(palette))
    (tmp_path / "000002.png").write_bytes(encoded(bits))
    colours = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    images = open_images(tmp_path, channels=3)
    found = images.read([1, 2]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found[0], colours)
    assert np.array_equal(found[1], np.repeat((PIXELS[2, ..., :1] > 99) * np.uint8(255), 3, 2))
    assert images.facts["greyscale_expanded"] == 1


def png_of_16_bits(colour_type: int, channels: int) -> bytes:
    """8x10, by hand, as PIL writes none in colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = np.zeros((10, 1 + 8 * 2 * channels), np.uint8)
    header = struct.pack(">IIBBBBB", 8, 10, 16, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def transparent_palette() -> bytes:
    return encoded(Image.fromarray(PIXELS[0]).quantize(16), transparency=3)


UNUSABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "RGBA": (lambda: encoded(Image.fromarray(PIXELS[0]).convert("RGBA")), r"is transparent \(RGBA\)"),
    "LA": (lambda: encoded(Image.fromarray(PIXELS[0]).convert("LA")), r"is transparent \(LA\)"),
    "palette": (transparent_palette, r"is transparent \(P\)"),
    "one transparent colour": (lambda: encoded(PIXELS[0], transparency=(1, 2, 3)), r"is transparent \(RGB\)"),
    "16 bits, grey": (lambda: encoded(PIXELS[0, ..., 0].astype(np.uint16) * 257), "has 16 bits a channel"),
    "16 bits, RGB": (lambda: png_of_16_bits(2, 3), "has 16 bits a channel; expected 8-bit RGB or greyscale"),
    "another size": (lambda: encoded(PIXELS[0, :-1]), "is 8x9; expected 8x10; bring them to that size first"),
    "text": (lambda: b"<html>not found</html>", "is no PNG, JPEG, WEBP, BMP"),
    "empty": (lambda: b"", "is no PNG, JPEG, WEBP, BMP"),
    "GIF": (lambda: encoded(PIXELS[0], "GIF"), "is no PNG, JPEG, WEBP, BMP"),
    "cut PNG": (lambda: encoded(PIXELS[0])[:150], r"cannot be read \(.*\); make or copy it again"),
    "cut header": (lambda: encoded(PIXELS[0])[:20], r"(cannot be read \(.*\)|is no PNG, .*); make or copy it again"),
    "cut JPEG": (lambda: encoded(PIXELS[0], "JPEG")[:-30], r"cannot be read \(.*truncated"),
    "changed byte": (lambda: encoded(PIXELS[0])[:90] + b"\x00" + encoded(PIXELS[0])[91:], r"cannot be read \("),
}


def test_cmyk_is_converted_as_every_tool_does_with_the_few_of_imagenet(tmp_path: Path) -> None:
    where = folder_of(tmp_path / "a")
    content = encoded(Image.fromarray(PIXELS[0]).convert("CMYK"), "JPEG")
    (where / "000003.png").write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(open_images(where, channels=3).read([3])[0].numpy(), expected)
    with pytest.raises(DataError, match="is of mode"):
        open_images(where, channels=1).read([3])


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_what_would_change_a_score_silently_is_refused_by_name(kind: str, form: str, tmp_path: Path) -> None:
    content, message = UNUSABLE[kind]
    where = folder_of(tmp_path / "a")
    (where / "000007.png").write_bytes(content())
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for path in where.iterdir():
                archive.write(path, path.name)
        where = tmp_path / "a.zip"
    images = open_images(where, channels=3)
    assert torch.equal(images.read(range(7)), tensor()[:7])
    with pytest.raises(DataError, match=rf"images {re.escape(str(where))}: 000007\.png {message}"):
        images.read(range(5, 10))
    if kind not in ("cut PNG", "cut JPEG", "changed byte"):  # known from the header
        with pytest.raises(DataError, match=rf"000007\.png {message}"):
            images.sha256()


def test_the_first_image_is_looked_at_at_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    with pytest.raises(DataError, match=r"000000\.png is 8x10; expected 32x32; bring them to that size first"):
        open_images(folder, channels=3, size=32)
    with pytest.raises(DataError, match=r"are 8x10; expected 32x32"):
        open_images(saved("x", np.savez, arr_0=PIXELS)(tmp_path), channels=3, size=32)
    (folder / "000000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"000000\.png is no PNG"):
        open_images(folder, channels=3)


def test_all_damaged_images_are_named_at_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / "000002.png").write_bytes(b"no header")
    for number in (4, 9):
        whole = (folder / f"{number:06d}.png").read_bytes()
        (folder / f"{number:06d}.png").write_bytes(whole[: len(whole) // 2])
    images = open_images(folder, channels=3)
    for see in (images.sha256, lambda: images.read([4])):
        with pytest.raises(DataError, match=r"000002\.png .*; 000004\.png .*000009\.png") as raised:
            see()
        assert str(raised.value).count(".png") == 3


def test_hashing_finds_all_that_do_not_fit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    for number in range(3, 11):
        (folder / f"{number:06d}.png").write_bytes(encoded(PIXELS[0, :, :-1]))
    with pytest.raises(DataError, match=r"000003\.png is 7x10.*; likewise 000004\.png, .*000008\.png and 2 more$"):
        open_images(folder, channels=3).sha256()
    open_images(folder, channels=3, recipe="squash", size=8).sha256()


def test_a_file_that_vanished(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    images = open_images(folder, channels=3)
    (folder / "000004.png").unlink()
    for see in (lambda: images.read(range(COUNT)), images.sha256):
        with pytest.raises(DataError, match=r"000004\.png cannot be read \(No such file or directory\)"):
            see()


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in this folder"):
        open_images(tmp_path, channels=3)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError, match="no images in this folder"):
        open_images(tmp_path, channels=3)
    with pytest.raises(DataError, match="no such file or folder"):
        open_images(tmp_path / "nowhere", channels=3)
    folder = folder_of(tmp_path / "a")
    (folder / "scores.json").write_text("{}")
    (folder / ".hidden.png").write_text("none")
    assert len(open_images(folder, channels=3)) == COUNT


ROUNDED: dict[tuple[float, float], Callable[[np.ndarray], np.ndarray]] = {
    (-1.2, 1.2): lambda x: to_uint8(torch.from_numpy(x)).numpy(),
    (-0.1, 1.1): lambda x: np.floor(x.clip(0, 1) * 255 + np.float32(0.5)).astype(np.uint8),
    (-3, 258): lambda x: np.floor(x.clip(0, 255) + np.float32(0.5)).astype(np.uint8),
}


@pytest.mark.parametrize("meant", ROUNDED)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numbers_are_refused_with_the_way_to_round_those_of_their_range(
    meant: tuple[float, float], save: Any, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).uniform(*meant, (20, 8, 8, 3)).astype(np.float32)
    with pytest.raises(
        DataError, match=r"images are float32 \[20, 8, 8, 3\]; expected uint8.*; from the range"
    ) as caught:
        open_images(saved("x", save, arr_0=x)(tmp_path), channels=3)
    advice = re.search(r"round values x by (\(x .*\))$", str(caught.value))
    assert advice is not None
    as_advised = eval(advice[1], {"x": x})
    assert np.array_equal(as_advised, ROUNDED[meant](x))
    assert len(open_images(saved("y", save, arr_0=as_advised)(tmp_path), channels=3)) == 20


@pytest.mark.parametrize(
    ("x", "advice"),
    [
        (PIXELS.astype(np.int64), r"; save them as x\.astype\('uint8'\)$"),
        (PIXELS.astype(np.uint16) * 257, r"; it holds \d+ to 65535: bring them to \[0, 255\]$"),
        (np.full((2, 8, 8, 3), np.nan), "; it holds NaN or infinity: make the images again$"),
        (PIXELS.astype(np.float64) * 1000, r"; it holds \S+ to 255000: bring them to \[0, 255\]$"),
    ],
)
def test_other_numbers_are_not_rounded_by_a_formula_that_is_wrong_for_them(
    x: np.ndarray, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=advice) as caught:
        open_images(saved("x", np.savez, arr_0=x)(tmp_path), channels=3)
    assert "127.5" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 4), np.uint8)}, "4 channels; expected 3"),
        ({"arr_0": np.zeros((2, 8, 8, 5), np.uint8)}, "neither 1, 3 nor 4 channels"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "none; expected at least one"),
        ({"mu": np.zeros(3)}, "expected 'images' or 'arr_0'"),
        ({"arr_0": PIXELS, "y": np.array([0, 1])}, "2 labels for 13 images"),
        ({"arr_0": PIXELS, "y": np.array([{}] * 13)}, "cannot be read as plain arrays"),
        ({"arr_0": np.array([{}])}, "cannot be read as plain arrays"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_images(saved("x", np.savez, **arrays)(tmp_path), channels=3)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read as plain arrays"):
        open_images(tmp_path / "cut.npz", channels=3)


def test_a_damaged_npz(tmp_path: Path) -> None:
    path = saved("x", np.savez, arr_0=PIXELS)(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as plain arrays .*CRC"):
        open_images(path, channels=3)


def test_a_large_npz_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 128, 128, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    monkeypatch.setattr("evaluation.stored._CHUNK", 1 << 18)
    tracemalloc.start()
    try:
        images = open_images(tmp_path / "x.npz", channels=3)
        batch = images.read(range(100, 104))
        images.sha256()
        assert tracemalloc.get_traced_memory()[1] < pixels.nbytes / 10
    finally:
        tracemalloc.stop()
    assert torch.equal(batch, tensor(pixels[100:104]))


def test_hashing_streams(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 128, 128, 3), dtype=np.uint8)
    folder = folder_of(tmp_path / "a", pixels, "bmp", "BMP")
    images = open_images(folder, channels=3)
    tracemalloc.start()
    try:
        found = images.sha256()
        assert tracemalloc.get_traced_memory()[1] < pixels.nbytes / 2
    finally:
        tracemalloc.stop()
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    content = b"".join(len(file).to_bytes(8, "little") + file for file in files)
    assert found == hashlib.sha256(content).hexdigest()


def test_the_hash_is_of_content_in_order(tmp_path: Path) -> None:
    def sha256(where: Path, **options: Any) -> str | None:
        return open_images(where, channels=3, **options).sha256()

    folder = folder_of(tmp_path / "a")
    first = sha256(folder)
    assert first is not None
    assert re.fullmatch("[0-9a-f]{64}", first)
    shutil.copytree(folder, tmp_path / "deeper" / "copy")
    assert sha256(tmp_path / "deeper" / "copy") == first
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, renamed / f"x{path.name}")
    assert sha256(renamed) == first
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    assert sha256(tmp_path / "a.zip") == first
    hashes = {first, sha256(folder, max_images=12)}
    hashes |= {sha256(folder, recipe=recipe, size=size) for recipe in ("squash", "adm") for size in (8, 16)}
    shutil.copy(folder / "000001.png", renamed / "x000002.png")
    shutil.copy(folder / "000002.png", renamed / "x000001.png")
    hashes.add(sha256(renamed))
    changed = PIXELS.copy()
    changed[-1, -1, -1, -1] ^= 1
    hashes |= {
        sha256(folder_of(tmp_path / "changed", changed)),
        sha256(folder_of(tmp_path / "more", PIXELS[[*range(13), 12]])),
    }
    assert len(hashes) == 9
    assert sha256(folder) == first


def test_the_hash_of_arrays(tmp_path: Path) -> None:
    def sha256(name: str, save: Any, pixels: np.ndarray, **options: Any) -> str | None:
        return open_images(saved(name, save, arr_0=pixels)(tmp_path), channels=3, **options).sha256()

    first = sha256("a", np.savez, PIXELS)
    assert sha256("b", np.savez_compressed, PIXELS) == first
    assert sha256("c", np.savez, PIXELS.transpose(0, 3, 1, 2).copy()) == first
    changed = PIXELS.copy()
    changed[-1, -1, -1, -1] ^= 1
    others = {
        sha256("d", np.savez, changed),
        sha256("e", np.savez, PIXELS[::-1]),
        sha256("f", np.savez, PIXELS.reshape(13, 8, 10, 3)),
        sha256("g", np.savez, PIXELS, max_images=5),
        sha256("h", np.savez, PIXELS, recipe="squash", size=8),
    }
    assert len({first, *others}) == 6


def test_a_folder_that_generate_wrote(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = generate(tiny_teacher, num_images=6, output=tmp_path / "a", seed=3, num_steps=2, class_labels=[4, 1])
    images = open_images(folder, channels=1)
    for number in range(6):
        with Image.open(folder / f"{number:06d}.png") as image:
            assert torch.equal(images.read([number])[0, 0], torch.from_numpy(np.array(image)))
    assert images.labels is not None
    assert images.labels.tolist() == [4, 1, 4, 1, 4, 1]
    assert images.labels.dtype == torch.int64
    assert images.prompts is None
    facts = images.facts
    assert (facts["checkpoint"], facts["kind"], facts["seed"]) == (str(tiny_teacher), "teacher", 3)
    assert (facts["evaluations_per_image"], facts["guidance"]) == (3, 1.0)
    assert {"checkpoint_sha256", "images_per_second", "device"} <= facts.keys()
    few = open_images(folder, channels=1, max_images=3).labels
    assert few is not None
    assert few.tolist() == [4, 1, 4]


def test_prompts_of_a_manifest_and_of_captions(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    prompts = [f"a photo of {number}" for number in range(COUNT)]
    for number, prompt in enumerate(prompts):
        (folder / f"{number:06d}.txt").write_text(prompt.upper())
    assert open_images(folder, channels=3).prompts == [prompt.upper() for prompt in prompts]
    (folder / "manifest.json").write_text(json.dumps({"prompts": prompts, "labels": None}))
    images = open_images(folder, channels=3, max_images=4)
    assert images.prompts == prompts[:4]
    assert images.labels is None
    images.prompts = ["other"] * 4
    assert images.prompts == ["other"] * 4
    (folder / "manifest.json").unlink()
    (folder / "000003.txt").unlink()
    captioned = open_images(folder, channels=3)
    assert torch.equal(everything(captioned), tensor())
    with pytest.raises(DataError, match=r"images without a caption: 1 of 13, the first is 000003\.png"):
        assert captioned.prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("\xff", "cannot be read as JSON"),
        ('{"labels": [1, 2]}', "2 labels for 13 images"),
        ('{"labels": []}', "expected one integer class id per image"),
        (json.dumps({"labels": [0.5] * COUNT}), "expected one integer class id per image"),
        (json.dumps({"labels": [-1] * COUNT}), "label -1 is negative"),
        (json.dumps({"labels": "0" * COUNT}), "expected one integer class id per image"),
        (json.dumps({"prompts": ["a"] * 12}), "12 prompts for 13 images"),
        (json.dumps({"prompts": "a" * COUNT}), "prompts are not a list of texts"),
        (json.dumps({"prompts": [1] * COUNT}), "prompts are not a list of texts"),
    ],
)
def test_manifests_that_do_not_fit(text: str, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        open_images(folder, channels=3, max_images=12)


def test_embedded_sets() -> None:
    digits = open_images("digits", channels=1)
    images, labels = load_digits()
    assert torch.equal(everything(digits, 500), images)
    assert digits.labels is not None
    assert torch.equal(digits.labels, labels)
    captioned = open_images("digit-captions", channels=3)
    pictures, prompts = load_captioned_digits()
    assert torch.equal(everything(captioned, 500), pictures)
    assert captioned.prompts == [prompt.text for prompt in prompts]


def test_fewer_images_than_asked_for(tmp_path: Path) -> None:
    images = open_images(folder_of(tmp_path / "a"), channels=3, max_images=50_000)
    assert len(images) == COUNT
    with pytest.raises(ArgumentError, match="max_images: expected at least 1, got 0"):
        open_images(tmp_path / "a", channels=3, max_images=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 4}, "channels: expected 1 or 3, got 4"),
        ({"channels": 3, "recipe": "center-lanzos", "size": 8}, "did you mean 'center-lanczos'"),
        ({"channels": 3, "recipe": "adm"}, "'adm' makes squares of a given size"),
        ({"channels": 3, "recipe": "adm", "size": 0}, "size: expected at least 1, got 0"),
    ],
)
def test_settings_that_fit_nothing(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        open_images(tmp_path, **settings)
    with pytest.raises(ArgumentError, match=message):
        Preparation(**settings)

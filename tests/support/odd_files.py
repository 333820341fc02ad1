"""Files of every format that is read, whole, damaged and hostile, drawn at random from a seed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as safetensors

from support.denoisers import tiny_unet
from support.pickles import dumps, edm_content

FIRST_LAYOUT = Path(__file__).parent.parent / "fixtures" / "first-layout"


class _Runs:
    """Pickled as a call that would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def png(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return file.getvalue()


def arrays(compressed: bool = False, **named: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **named)
    return file.getvalue()


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def declared(shape: tuple[int, ...]) -> bytes:
    """An .npz whose array says that it is larger than any memory."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape!r}, }}"
    header += " " * (118 - len(header)) + "\n"
    return zipped({"images.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()})


@lru_cache
def _wide_png() -> bytes:
    """A whole PNG of 13,000 x 13,000 black pixels in 160 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(1)
    data = b"".join([*(rows.compress(bytes(13_001)) for _ in range(13_000)), rows.flush()])
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _huge_png() -> bytes:
    """A PNG that says it is 60,000 pixels wide and high."""
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    return bytes(data)


_IMAGES = np.random.default_rng(1).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8)
_MEMBERS = {f"{i % 3}/{i:03d}.png": png() for i in range(70)}
_SHARD = {f"{i:03d}.{end}": data for i in range(70) for end, data in (("png", png()), ("cls", b"%d" % (i % 3)))}
_WEIGHTS = {f"layer.{i}.weight": torch.randn(4, 4) for i in range(3)}
_LORA = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 8),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(8, 2),
}
_SCORES = {
    "metrics": {"fd_digits": 1.5, "class_accuracy": 0.9},
    "spread": {},
    "provenance": {"protocol": "digits", "samples": {"name": "a", "count": 70}},
}
_CONFIG = (Path(__file__).parent.parent.parent / "configs" / "digits.yaml").read_bytes()
_DEEP = b"[" * 100_000

#: A file's name -> its content, for every kind of file that is read.
SPECIMENS: dict[str, Callable[[], bytes]] = {
    "one.png": png,
    "one.jpg": lambda: png(kind="JPEG"),
    "images.zip": lambda: zipped(_MEMBERS),
    "edm.zip": lambda: zipped(
        {**_MEMBERS, "dataset.json": json.dumps({"labels": [[name, 1] for name in _MEMBERS]}).encode()}
    ),
    "deflated.zip": lambda: zipped(_MEMBERS, zipfile.ZIP_DEFLATED),
    "images.npz": lambda: arrays(images=_IMAGES, labels=np.arange(70) % 3),
    "compressed.npz": lambda: arrays(True, images=_IMAGES, labels=np.arange(70) % 3),
    "moments.npz": lambda: arrays(mu=np.zeros(64), sigma=np.eye(64)),
    "shard.tar": lambda: tarred(_SHARD),
    "captions.tar": lambda: tarred({f"{i}.{e}": d for i in range(9) for e, d in (("png", png()), ("txt", b"a seven"))}),
    "prompts.txt": lambda: "a bold seven\na thin three\nein Haus am Müggelsee\n".encode(),
    "prompts.jsonl": lambda: b'{"caption": "a bold seven"}\n{"text": "a thin three"}\n',
    "scores.json": lambda: json.dumps(_SCORES).encode(),
    "config.yaml": lambda: _CONFIG,
    "small.yaml": lambda: b"iterations: 2\ngenerator: {lr: 1e-5}\nratio:\n  num_bins: 4\n",
    "weights.safetensors": lambda: safetensors(_WEIGHTS),
    "lora.safetensors": lambda: safetensors(_LORA),
    "weights.pt": lambda: saved(_WEIGHTS),
    "weights.bin": lambda: saved({"model": _WEIGHTS, "epoch": 3}),
    "network.pkl": lambda: dumps(edm_content(tiny_unet(), Path("executed"))),
    "plain.pkl": lambda: pickle.dumps({"ema": {"a": np.zeros(3)}}),
    "cifar-10-python.tar.gz": lambda: tarred({"cifar-10-batches-py/data_batch_1": pickle.dumps({b"labels": [1]})}),
}

#: What nobody means well, or means at all; under the name of a specimen whose reader meets it.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "huge.png": _huge_png,
    "wide.png": _wide_png,
    "huge.npz": lambda: declared((2**40, 8, 8)),
    "negative.npz": lambda: declared((-4, 8, 8)),
    "objects.npz": lambda: arrays(images=np.array([{}, _Runs()], dtype=object)),
    "bomb.zip": lambda: zipped({"a.png": bytes(40_000_000)}, zipfile.ZIP_DEFLATED),
    "slip.zip": lambda: zipped({"../../a.png": png(), "/etc/b.png": png()}),
    "slip.tar": lambda: tarred({"../a.png": png()}, {"b.png": "/etc/passwd", "c.png": "/dev/zero"}),
    "deep.json": lambda: _DEEP,
    "deep.jsonl": lambda: b'{"text": ' + _DEEP + b"}\n",
    "deep.yaml": lambda: _DEEP[:5_000],
    "bomb.yaml": lambda: b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "tags.yaml": lambda: b"iterations: !!python/object/apply:os.system [touch executed]\n",
    "numbers.json": lambda: b'{"metrics": {"fd_digits": NaN, "x": 1e999}, "spread": [], "provenance": 3}',
    "long.json": lambda: b'{"metrics": ' + b"9" * 5_000 + b"}",
    "runs.pkl": lambda: pickle.dumps(_Runs()),
    "runs.pt": lambda: saved({"a": _Runs()}),
    "memo.pkl": lambda: b"\x80\x04" + b"]\x94" + b"(" * 50_000 + b".",
    "sizes.safetensors": lambda: struct.pack("<Q", 2**62) + b"{}",
    "overlap.safetensors": lambda: _header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "types.safetensors": lambda: _header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}),
    "nul.txt": lambda: b"a\x00b\n\xff\xfe\n",
    "line.txt": lambda: b"a " * 500_000,
    "blank.txt": lambda: b"\n\n \n",
    "list.jsonl": lambda: b'[1]\n{"text": 3}\n',
}


def _header(entries: dict[str, Any]) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 3, 30))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _zeroed(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    length = min(draw.choice((8, 512, 4096)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def _beginning(data: bytes, draw: random.Random) -> bytes:
    """Damage where headers are."""
    place = draw.randrange(min(len(data), 64))
    return data[:place] + draw.randbytes(draw.choice((1, 4, 8))) + data[place + 4 :]


def _end(data: bytes, draw: random.Random) -> bytes:
    """Damage where archives have their tables."""
    place = max(0, len(data) - 1 - draw.randrange(64))
    return data[:place] + draw.randbytes(4) + data[place + 4 :]


def _swapped_values(data: bytes, draw: random.Random) -> bytes:
    """Of a text such as JSON or YAML: one word is another kind of value."""
    words = data.split()
    if len(words) < 2:
        return b"null"
    old = draw.choice(words)
    return data.replace(old, draw.choice((b"null", b"[]", b"{}", b'"x"', b"-1", b"1e999", b"", b"\xff")), 1)


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    lambda data, draw: data,
    lambda data, draw: b"",
    lambda data, draw: draw.randbytes(100),
    lambda data, draw: data + draw.randbytes(50),
    _cut,
    _cut,
    _flipped,
    _flipped,
    _zeroed,
    _beginning,
    _end,
    _swapped_values,
]


def damaged(data: bytes, draw: random.Random) -> bytes:
    return draw.choice(DAMAGES)(data, draw) if data else data


def odd_file(names: list[str], folder: Path, draw: random.Random) -> Path:
    """A file in `folder`: one of the named specimens, or of all, or a hostile one, damaged or not."""
    share = draw.random()
    if share < 0.2:
        name = draw.choice(list(HOSTILE))
        data = HOSTILE[name]()
    else:
        name = draw.choice(names if share < 0.8 else list(SPECIMENS))
        data = damaged(SPECIMENS[name](), draw)
    if draw.random() < 0.25:  # under the suffix of what was asked for
        name = Path(name).stem + Path(draw.choice(names)).suffix
    path = folder / draw.choice(("", "", "", "ä b ", "-", "x" * 100)).__add__(name)
    path.write_bytes(data)
    return path


def odd_folder(source: Path, folder: Path, draw: random.Random) -> Path:
    """A copy of a checkpoint's or run's folder in which one file is damaged, missing, hostile or no file."""
    path = folder / source.name
    shutil.copytree(source, path, symlinks=True)
    victim = draw.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
    data, share = victim.read_bytes(), draw.random()
    victim.unlink()
    if share < 0.1:
        victim.mkdir()
    elif share < 0.15:
        victim.symlink_to(victim.name)
    elif share < 0.3:
        victim.write_bytes(HOSTILE[draw.choice(list(HOSTILE))]())
    elif share < 0.9:
        victim.write_bytes(damaged(data, draw))
    return path


def odd_images(folder: Path, draw: random.Random) -> Path:
    """A folder of images, among them odd ones and what is no image."""
    path = folder / "images"
    for number in range(70):
        file = path / str(number % 3) / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png())
    for _ in range(draw.choice((1, 3))):
        place = draw.choice([path, path / "0", path / "new"])
        place.mkdir(exist_ok=True)
        file = odd_file(["one.png", "one.jpg", "prompts.jsonl"], place, draw)
        if draw.random() < 0.4:
            named = draw.choice(("metadata.jsonl", "manifest.json", "dataset.json", "000.txt", "x.png", "Thumbs.db"))
            file.rename(place / named)
    if draw.random() < 0.2:
        os.mkfifo(path / "0" / "pipe.png")
    if draw.random() < 0.2:
        (path / "0" / "endless.png").symlink_to("/dev/zero")
    return path

"""Sources: the same images and labels from every format, and one clear sentence for what is not one."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdistill.base.errors import DataError
from fdistill.data import Batching, ImageLoader, load_data, open_source
from fdistill.data.account import account_of
from fdistill.data.cifar10 import open_cifar10
from fdistill.data.recipes import open_image
from fdistill.data.source import Source
from fdistill.data.webdataset import expand_braces

COUNT = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
LABELS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
NAMES = [f"{label:05d}/img{number:08d}.png" for number, label in enumerate(LABELS)]


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def class_folder(tmp: Path) -> Path:
    for name, pixels in zip(NAMES, PIXELS, strict=True):
        write(tmp / "classes" / name, png(pixels))
    return tmp / "classes"


def dataset_json(labels: object) -> str:
    return json.dumps({"labels": labels})


def edm_labels() -> list[list[object]]:
    return [[name, label] for name, label in zip(NAMES, LABELS, strict=True)][::-1]


def edm_folder(tmp: Path) -> Path:
    folder = class_folder(tmp)
    write(folder / "dataset.json", dataset_json(edm_labels()).encode())
    return folder


def edm_zip(tmp: Path, text: str | None = None) -> Path:
    tmp.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(tmp / "set.zip", "w") as archive:
        for name, pixels in zip(NAMES, PIXELS, strict=True):
            archive.writestr(name, png(pixels))
        archive.writestr("dataset.json", dataset_json(edm_labels()) if text is None else text)
    return tmp / "set.zip"


def npz(tmp: Path) -> Path:
    np.savez(tmp / "set.npz", arr_0=PIXELS, arr_1=np.array(LABELS))
    return tmp / "set.npz"


def npz_channels_first(tmp: Path) -> Path:
    np.savez(tmp / "set.npz", images=PIXELS.transpose(0, 3, 1, 2), y=np.array(LABELS))
    return tmp / "set.npz"


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(rows: range, label: Callable[[int], tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    members = []
    for row in rows:
        extension, text = label(row)
        members += [(f"sub/{row:04d}.{extension}", text), (f"sub/{row:04d}.png", png(PIXELS[row]))]
    return members


def cls(row: int) -> tuple[str, bytes]:
    return "cls", str(LABELS[row]).encode()


def in_json(row: int) -> tuple[str, bytes]:
    return "json", json.dumps({"label": LABELS[row], "caption": "x"}).encode()


def shards(tmp: Path) -> str:
    tar(tmp / "shard-00.tar", samples(range(5), cls))
    tar(tmp / "shard-01.tar", samples(range(5, COUNT), in_json))
    return f"{tmp}/shard-{{00..01}}.tar"


def shard_folder(tmp: Path) -> Path:
    shards(tmp / "shards")
    return tmp / "shards"


def one_tar(tmp: Path) -> Path:
    return tar(tmp / "one.tar", samples(range(COUNT), cls))


def hf_dataset() -> object:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    images = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]
    return datasets.Dataset.from_dict({"image": images, "label": LABELS}, features=features)


def saved(tmp: Path) -> Path:
    hf_dataset().save_to_disk(tmp / "saved")
    return tmp / "saved"


def saved_splits(tmp: Path) -> Path:
    import datasets

    data = hf_dataset()
    datasets.DatasetDict({"test": data.select([3]), "train": data}).save_to_disk(tmp / "saved")
    return tmp / "saved"


def parquet(tmp: Path) -> Path:
    hf_dataset().to_parquet(tmp / "train.parquet")
    return tmp / "train.parquet"


def parquet_folder(tmp: Path) -> Path:
    """As in a clone of a hub repository; without the metadata of `datasets`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp / "rows").mkdir()
    for name, rows in (("train-0", range(5)), ("train-1", range(5, COUNT)), ("test-0", range(2))):
        images = [{"bytes": png(PIXELS[row]), "path": f"{row}.png"} for row in rows]
        table = pa.table({"picture": images, "label": [LABELS[row] for row in rows]})
        pq.write_table(table, tmp / "rows" / f"{name}.parquet")
    return tmp / "rows"


FORMATS = [
    class_folder,
    edm_folder,
    edm_zip,
    npz,
    npz_channels_first,
    shards,
    shard_folder,
    one_tar,
    saved,
    saved_splits,
    parquet,
    parquet_folder,
]


def decoded(source: Source) -> np.ndarray:
    return np.stack([np.asarray(open_image(source.encoded(row))) for row in range(len(source))])


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_every_format_gives_the_same_images_and_labels(make: Callable[[Path], object], tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path)))
    copy = pickle.loads(pickle.dumps(source))  # before and after its files were opened
    assert np.array_equal(decoded(source), PIXELS)
    assert source.labels.dtype == torch.long
    assert source.labels.tolist() == LABELS
    assert source.num_classes == 3
    assert len(source) == COUNT
    assert source.item_name(3)
    assert np.array_equal(decoded(pickle.loads(pickle.dumps(source))), PIXELS)
    assert np.array_equal(decoded(copy), PIXELS)


@pytest.mark.parametrize("make", [edm_zip, one_tar, saved], ids=lambda make: make.__name__)
def test_forked_processes_do_not_share_a_file_position(make: Callable[[Path], object], tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path)))
    source.encoded(0)  # opened before the fork
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            good = all(np.array_equal(decoded(source), PIXELS) for _ in range(20))
            os._exit(0 if good else 1)
        children.append(child)
    assert all(np.array_equal(decoded(source), PIXELS) for _ in range(20))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_digits() -> None:
    source, data = open_source("digits"), load_data("digits")
    assert np.array_equal(decoded(source), data.images[:, 0].numpy())
    assert torch.equal(source.labels, data.labels)
    assert source.num_classes == 10


def test_a_misspelt_name_gets_the_nearest() -> None:
    for name, meant in (("digit", "digits"), ("teacher-sample", "teacher-samples")):
        with pytest.raises(DataError, match=f"no such file or folder; did you mean '{meant}'"):
            open_source(name)


def test_sources_without_labels(tmp_path: Path) -> None:
    for number, kind in enumerate(("jpeg", "webp", "bmp", "png")):
        write(tmp_path / "flat" / f"{number}.{kind.upper()}", png(PIXELS[number], kind))
    write(tmp_path / "flat" / "notes.txt", b"text")
    write(tmp_path / "flat" / ".hidden" / "x.png", b"")
    write(tmp_path / "flat" / "._0.png", b"")  # macOS writes these beside files on foreign disks
    tar(tmp_path / "flat.tar", [("a.png", png(PIXELS[0])), ("b.json", b"{}"), ("b.png", png(PIXELS[1]))])
    np.savez(tmp_path / "flat.npz", images=PIXELS[:, :, :, 0])
    places = ["flat", "flat.tar", "flat.npz"]
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        archive.writestr("x.png", png(PIXELS[0]))
    with zipfile.ZipFile(tmp_path / "null.zip", "w") as archive:
        archive.writestr("x.png", png(PIXELS[0]))
        archive.writestr("dataset.json", dataset_json(None))
    for place, count in zip([*places, "flat.zip", "null.zip"], (4, 2, COUNT, 1, 1), strict=True):
        source = open_source(str(tmp_path / place))
        assert source.num_classes is None
        assert source.labels.tolist() == [0] * count == [0] * len(source)
    assert np.array_equal(decoded(open_source(str(tmp_path / "flat.npz"))), PIXELS[:, :, :, 0])


def cifar_batches(kind: str) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (5, 4, 3072), dtype=np.uint8)
    labels = generator.integers(0, 10, (5, 4), dtype=np.uint8)
    if kind == "bin":
        content = {
            f"data_batch_{k + 1}.bin": np.concatenate([labels[k][:, None], pixels[k]], 1).tobytes() for k in range(5)
        }
    else:
        content = {
            f"data_batch_{k + 1}": python2_pickle(pixels[k])
            if k == 0
            else pickle.dumps({b"data": pixels[k], b"labels": labels[k].tolist()}, protocol=4)
            for k in range(5)
        }
        labels[0] = [3, 1, 4, 1]
    return content, pixels.reshape(-1, 3, 32, 32), labels.reshape(-1)


def python2_pickle(pixels: np.ndarray) -> bytes:
    """Opcode by opcode what Python 2 wrote: text is SHORT_BINSTRING and BINSTRING, not bytes."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    shape = b"".join(b"M" + size.to_bytes(2, "little") for size in pixels.shape)
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2
    state = b"(K\x01(" + shape + b"t" + dtype + b"K\x00tb" + b"\x89" + text(pixels.tobytes()) + b"tb"
    return b"\x80\x02}(" + text(b"data") + array + state + text(b"labels") + b"](K\x03K\x01K\x04K\x01eu."


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_cifar10_packed_and_extracted(kind: str, tmp_path: Path) -> None:
    content, pixels, labels = cifar_batches(kind)
    folder = f"cifar-10-batches-{kind}"
    for name, data in content.items():
        write(tmp_path / "around" / folder / name, data)
    write(tmp_path / "around" / folder / f"test_batch{'.bin' if kind == 'bin' else ''}", b"not read")
    archive = tmp_path / ("cifar-10-python.tar.gz" if kind == "py" else "cifar-10-binary.tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "around" / folder, folder)
    for path in (archive, tmp_path / "around", tmp_path / "around" / folder):
        source = open_source(str(path))
        assert np.array_equal(decoded(source), pixels.transpose(0, 2, 3, 1))
        assert source.labels.tolist() == labels.tolist()
        assert source.num_classes == 10

    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(DataError, match="not a whole archive"):
        open_source(str(archive))
    last = sorted(content)[-1]
    (tmp_path / "around" / folder / last).unlink()
    with pytest.raises(DataError, match=f"{last} cannot be read"):
        open_source(str(tmp_path / "around"))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("evil",)


def test_cifar10_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = cifar_batches("py")[0]
    evil = [
        {},
        Evil(),
        np.array([Evil()], dtype=object),
        np.zeros((2, 3072)),
        np.zeros((2, 3072), np.uint16),
        np.zeros((2, 3072), np.int8),
    ]
    for data in [
        *(pickle.dumps({b"data": x, b"labels": [1, 2]}, protocol=4) for x in evil),
        b"",
        good["data_batch_1"][:99],
    ]:
        for name, content in (good | {"data_batch_3": data}).items():
            write(tmp_path / "cifar-10-batches-py" / name, content)
        with pytest.raises(DataError, match="data_batch_3: not a batch of CIFAR-10"):
            open_cifar10(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_names_in_archives_are_keys_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that would leave a folder when extracted stay what they are; other files are never opened."""
    inner = tmp_path / "inner"
    write(tmp_path / "secret.png", png(PIXELS[5]))
    with tarfile.open(write(inner / "set.tar", b""), "w") as archive:
        for name, kind, target in (
            ("../secret.png", tarfile.REGTYPE, ""),
            ("link.png", tarfile.SYMTYPE, "../secret.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            content = png(PIXELS[0]) if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(inner / "set.zip", "w") as archive:
        archive.writestr("../secret.png", png(PIXELS[0]))
        archive.writestr("/x.png", png(PIXELS[1]))
    monkeypatch.chdir(inner)
    source = open_source("set.tar")
    assert np.array_equal(decoded(source), PIXELS[:1])
    assert np.array_equal(decoded(open_source("set.zip")), PIXELS[:2])
    assert (tmp_path / "secret.png").read_bytes() == png(PIXELS[5])

    write(inner / "edm" / "a.png", png(PIXELS[0]))
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        (inner / "edm" / "dataset.json").write_text(dataset_json([["a.png", 1], [name, 2]]))
        with pytest.raises(DataError, match="not one of the images"):
            open_source("edm")


def test_saved_data_sets_stay_in_their_folder(tmp_path: Path) -> None:
    inside, outside = saved(tmp_path / "inside"), saved(tmp_path / "outside")
    state = json.loads((inside / "state.json").read_text())
    state["_data_files"][0]["filename"] = f"../../outside/saved/{state['_data_files'][0]['filename']}"
    assert (inside / state["_data_files"][0]["filename"]).resolve().parent == outside
    (inside / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="outside this folder"):
        open_source(str(inside))


def test_paths_in_parquet_are_not_followed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "secret.png", png(PIXELS[0]))
    pq.write_table(
        pa.table({"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}), tmp_path / "set.parquet"
    )
    source = open_source(str(tmp_path / "set.parquet"))
    with ImageLoader(source, (3, 8, 8), Batching(1, seed=0)) as loader, pytest.raises(DataError) as caught:
        next(loader)
    assert "paths in a data set are not followed" in str(caught.value)
    assert "cannot be decoded" not in str(caught.value)


def test_a_cls_counts_beside_a_json_without_label(tmp_path: Path) -> None:
    caption, image = b'{"caption": "x"}', png(PIXELS[0])
    first = [("1.json", caption), ("1.cls", b"2"), ("1.png", image)]
    second = [("2.png", image), ("2.cls", b"1\n"), ("2.json", caption)]
    assert open_source(str(tar(tmp_path / "set.tar", first + second))).labels.tolist() == [2, 1]


def test_braces() -> None:
    assert expand_braces("a/s-{0008..0011}.tar") == [f"a/s-{n:04d}.tar" for n in range(8, 12)]
    assert expand_braces("{0..1}/{1..2}") == ["0/1", "0/2", "1/1", "1/2"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def broken_sources(tmp: Path) -> dict[str, tuple[object, str]]:
    """case -> (where, what the error says)"""
    image = png(PIXELS[0])
    write(tmp / "empty" / "notes.txt", b"")
    write(tmp / "mixed" / "a" / "1.png", image)
    write(tmp / "mixed" / "1.png", image)
    write(tmp / "hollow" / "a" / "1.png", image)
    (tmp / "hollow" / "b").mkdir()
    write(tmp / "kinds" / "dataset.json", b"{}")
    tar(tmp / "kinds" / "x.tar", [("1.png", image)])
    write(tmp / "only-labels" / "dataset.json", dataset_json([]).encode())
    write(tmp / "strange.xyz", b"")
    write(tmp / "text.zip", b"text")
    write(tmp / "text.npz", b"text")
    write(tmp / "text.tar", b"text" * 200)
    write(tmp / "text.parquet", b"text")
    with zipfile.ZipFile(tmp / "no-images.zip", "w") as archive:
        archive.writestr("a.txt", "")
    with zipfile.ZipFile(tmp / "latents.zip", "w") as archive:
        archive.writestr("a.npy", "")
    np.savez(tmp / "no-images.npz", other=PIXELS)
    np.savez(tmp / "floats.npz", images=PIXELS / 255)
    np.savez(tmp / "channels.npz", images=PIXELS[:, :, :, :2])
    np.savez(tmp / "none.npz", images=PIXELS[:0])
    np.savez(tmp / "objects.npz", images=np.array([Evil()], dtype=object))
    np.savez(tmp / "few-labels.npz", images=PIXELS, labels=np.array([1, 2]))
    np.savez(tmp / "float-labels.npz", images=PIXELS, labels=np.linspace(0, 1, COUNT))
    np.savez(tmp / "one-hot.npz", images=PIXELS, labels=np.eye(COUNT, dtype=np.int64))
    np.savez(tmp / "negative.npz", images=PIXELS, labels=np.full(COUNT, -1))
    tar(tmp / "empty.tar", [])
    tar(tmp / "no-images.tar", [("1.cls", b"1")])
    tar(tmp / "words.tar", [("1.cls", b"cat"), ("1.png", image)])
    tar(tmp / "word.tar", [("1.json", b'{"label": "cat"}'), ("1.png", image)])
    tar(tmp / "fraction.tar", [("1.cls", b"1.5"), ("1.png", image)])
    tar(tmp / "list.tar", [("1.json", b"[]"), ("1.png", image)])
    tar(tmp / "some.tar", [("1.cls", b"1"), ("1.png", image), ("2.png", image)])
    tar(tmp / "twice.tar", [("1.jpg", image), ("1.png", image)])
    cut = tar(tmp / "cut.tar", [("1.png", image), ("2.png", bytes(4000))])
    cut.write_bytes(cut.read_bytes()[:2500])
    with tarfile.open(tmp / "packed.tar", "w:gz") as archive:
        archive.add(tmp / "strange.xyz")
    (tmp / "no-shards").mkdir()
    zips = {
        "words": ([["a", "b"]], "not one of the images"),
        "words-for-labels": ([[name, "cat"] for name in NAMES], "expected one integer"),
        "vectors": ([[name, [0.5, 1.0]] for name in NAMES], "expected one integer"),
        "uneven": ([[name, [1] * (row + 1)] for row, name in enumerate(NAMES)], "labels of different shapes"),
        "too-few": (edm_labels()[1:], r"no label for 00002/img00000011\.png"),
        "no-pairs": ([3], r'expected \{"labels"'),
    }
    cases: dict[str, tuple[object, str]] = {
        f"zip-{case}": (edm_zip(tmp / case, dataset_json(labels)), says) for case, (labels, says) in zips.items()
    }
    cases["zip-no-json"] = (edm_zip(tmp / "no-json", "{"), r'expected \{"labels"')
    cases["zip-no-object"] = (edm_zip(tmp / "no-object", "[]"), r'expected \{"labels"')
    says = {
        "nowhere": "no such file or folder",
        "empty": "no images in this folder",
        "mixed": "both at the top",
        "hollow": "class folder 'b' has no images",
        "kinds": r"holds a dataset\.json and tar files",
        "only-labels": "but no images",
        "no-shards": "no images in this folder",
        "strange.xyz": "a file of unknown kind",
        "text.zip": "cannot be read as a zip file",
        "text.npz": "cannot be read as plain arrays",
        "text.tar": "not a whole uncompressed tar file",
        "text.parquet": "cannot be read as parquet",
        "no-images.zip": "no images in this zip file",
        "latents.zip": r"no images in this zip file, but arrays such as a\.npy, as of latents; expected images",
        "no-images.npz": "arrays other; expected 'images'",
        "floats.npz": "images are float64",
        "channels.npz": "channels, first or last",
        "none.npz": r"uint8 \[0, 8, 8, 3\]",
        "objects.npz": "cannot be read as plain arrays",
        "few-labels.npz": "2 labels for 12 images",
        "float-labels.npz": "labels are float64",
        "one-hot.npz": r"of shape \[12, 12\]",
        "negative.npz": "label -1 is negative",
        "empty.tar": "no images in these tar files",
        "no-images.tar": "no images in these tar files",
        "words.tar": "expected one integer",
        "word.tar": "an object with an integer",
        "fraction.tar": r"label 1\.5; expected one integer",
        "list.tar": "an object with an integer",
        "some.tar": r"2\.png has no label",
        "twice.tar": "share a key",
        "cut.tar": "not a whole uncompressed tar file",
        "packed.tar": "not a whole uncompressed tar file",
        "shard-{0..1}.tar": "not a whole uncompressed tar file",
    }
    return cases | {case: (tmp / case, says) for case, says in says.items()}


def test_what_is_no_data_set_is_told_in_one_sentence(tmp_path: Path) -> None:
    for case, (where, says) in broken_sources(tmp_path).items():
        with pytest.raises(DataError, match=says) as caught:
            open_source(str(where))
        assert "\n" not in str(caught.value), case
        assert "data" in str(caught.value), case


def test_columns_that_are_no_images_or_labels(tmp_path: Path) -> None:
    import datasets

    data = hf_dataset()
    image, label = data.features["image"], data.features["label"]
    encoded = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]
    cases = {
        "expected one of images": data.remove_columns("image"),
        "each be the image": data.rename_column("image", "front").add_column("back", encoded, feature=image),
        "each be the label": data.add_column("coarse", LABELS, feature=label).rename_column("label", "fine"),
        "expected one integer": data.cast_column("label", datasets.Value("float32")),
    }
    for number, (says, changed) in enumerate(cases.items()):
        changed.save_to_disk(tmp_path / str(number))
        with pytest.raises(DataError, match=says):
            open_source(str(tmp_path / str(number)))
    data.select([]).save_to_disk(tmp_path / "no-row", num_shards=1)
    data.save_to_disk(tmp_path / "no-file")  # as newer versions save no rows
    state = tmp_path / "no-file" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": []}))
    for name in ("no-file", "no-row"):
        with pytest.raises(DataError, match="no rows"):
            open_source(str(tmp_path / name))
    data.remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    assert open_source(str(tmp_path / "unlabelled")).num_classes is None
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "test-only")
    with pytest.raises(DataError, match="no split 'train'; name the folder of one of: test"):
        open_source(str(tmp_path / "test-only"))
    next((tmp_path / "unlabelled").glob("*.arrow")).write_bytes(b"text")
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source(str(tmp_path / "unlabelled"))


def test_class_names_count_even_if_a_class_is_absent(tmp_path: Path) -> None:
    hf_dataset().select([0, 4]).save_to_disk(tmp_path / "two")
    source = open_source(str(tmp_path / "two"))
    assert source.num_classes == 3
    assert account_of(source).sentence() == "2 images in 3 classes (a -> 0 ... c -> 2)"


def test_the_hub_offline_fails_at_once() -> None:
    import datasets  # noqa: F401  (its import takes a second of its own)

    for where in ("hf:nobody/nothing", "hf:nobody/nothing:test"):
        start = time.perf_counter()
        with pytest.raises(DataError, match="HF_HUB_OFFLINE=1, so it must be in the cache") as caught:
            open_source(where)
        assert time.perf_counter() - start < 2
        assert "\n" not in str(caught.value)
    for where in ("hf:", "hf:../secret", "hf:a/b/c"):
        with pytest.raises(DataError, match="expected hf:owner/name"):
            open_source(where)


def test_a_data_set_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Nothing(datasets.ArrowBasedBuilder):
        """Leaves in the cache what a download of nobody/nothing would have left there."""

        def _info(self) -> datasets.DatasetInfo:
            return datasets.DatasetInfo(features=hf_dataset().features)

        def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
            splits = {"train": range(COUNT), "test": range(3)}
            return [datasets.SplitGenerator(name, {"rows": rows}) for name, rows in splits.items()]

        def _generate_tables(self, rows: range) -> Iterator[tuple[int, object]]:
            yield 0, hf_dataset().select(rows).data.table

    cache = tmp_path / "cache"
    Nothing(str(cache), repo_id="nobody/nothing", dataset_name="nothing", hash="0" * 40).download_and_prepare()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for where, count in (("hf:nobody/nothing", COUNT), ("hf:nobody/nothing:test", 3)):
        source = open_source(where)
        assert np.array_equal(decoded(source), PIXELS[:count])
        assert source.labels.tolist() == LABELS[:count]
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source("hf:nobody/nothing:validation")


@pytest.mark.thorough
def test_the_datasets_library_is_imported_only_when_needed_and_missed_with_advice(tmp_path: Path) -> None:
    parquet(tmp_path)
    code = (
        "import sys\nfrom fdistill.data import open_source\nfrom fdistill.base.errors import DataError\n"
        "open_source('digits')\nassert 'datasets' not in sys.modules\nsys.modules['datasets'] = None\n"
        f"for where in ('hf:a/b', {str(tmp_path / 'train.parquet')!r}):\n"
        "    try: open_source(where)\n    except DataError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("pip install 'fdistill[data]'") == 2

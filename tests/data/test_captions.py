"""Captions of every kind of source, lists of prompts, and one clear sentence for what is neither."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdistill.base.errors import DataError
from fdistill.data import open_source
from fdistill.data.captions import distinct
from fdistill.data.prompts import read_prompts
from fdistill.data.source import ArraySource

CAPTIONS = ["a bold seven", "ein schönes Haus, 家", "line\u2028separator", "a bold seven", "many\nlines"]
NAMES = [f"{row:02d}" for row in range(len(CAPTIONS))]


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), row, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def images(folder: Path) -> Path:
    for row, name in enumerate(NAMES):
        write(folder / f"{name}.png", png(row))
    return folder


def lines(rows: list[object]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, text in members.items():
            content = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def text_files(tmp: Path) -> Path:
    """Beside a list that has only labels."""
    write(tmp / "metadata.jsonl", lines([{"file_name": f"{NAMES[0]}.png", "label": 3}]))
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        write(images(tmp) / f"{name}.txt", f"\ufeff {caption}\r\n")
    return tmp


def text_files_in_class_folders(tmp: Path) -> Path:
    for row, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
        write(tmp / f"class{row // 3}" / f"v2.{name}.JPG", png(row))
        write(tmp / f"class{row // 3}" / f"v2.{name}.TXT", caption)
    return tmp


def metadata(tmp: Path, file: str = "metadata.jsonl", key: str = "text") -> Path:
    rows = [{"file_name": f"./{name}.png", key: caption} for name, caption in zip(NAMES, CAPTIONS, strict=True)]
    write(images(tmp) / file, lines(rows[::-1]) + "\n")
    write(tmp / "00.txt", "of another tool")  # the list goes first
    return tmp


def captions_list(tmp: Path) -> Path:
    return metadata(tmp, "captions.jsonl", "prompt")


def shards(tmp: Path) -> Path:
    """The first shard with .txt, before or behind a .json of other things; the second with .json of two captions."""
    first: dict[str, bytes | str] = {}
    for row in range(3):
        more = {f"a/{NAMES[row]}.json": json.dumps({"caption": "not this", "width": 4})}
        texts = {f"a/{NAMES[row]}.png": png(row), f"a/{NAMES[row]}.txt": CAPTIONS[row]}
        first |= texts | more if row % 2 else more | texts
    tar(tmp / "0.tar", first)
    second = {f"{NAMES[row]}.json": json.dumps({"text": [CAPTIONS[row], "another"]}) for row in (3, 4)}
    tar(tmp / "1.tar", {**second, **{f"{NAMES[row]}.png": png(row) for row in (3, 4)}})
    return tmp


def table(column: str, values: list[object]) -> object:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "id": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(row), "path": None} for row in range(len(values))], "id": list(range(len(values)))},
        features=features,
    )
    return data.add_column(column, values)


def saved(tmp: Path) -> Path:
    table("prompt", CAPTIONS).save_to_disk(tmp / "set")
    return tmp / "set"


def parquet(tmp: Path) -> Path:
    """Five captions to an image, of which the first is taken; another column of text is not."""
    data = table("caption", [[caption, "another"] for caption in CAPTIONS]).add_column("text", ["no"] * len(CAPTIONS))
    data.to_parquet(tmp / "train.parquet")
    return tmp / "train.parquet"


FORMATS = [text_files, text_files_in_class_folders, metadata, captions_list, shards, saved, parquet]


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_every_format_gives_each_image_its_caption(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path)))
    copy = pickle.loads(pickle.dumps(source))
    assert source.captions == CAPTIONS
    assert source.captions is source.captions  # read once
    assert copy.captions == CAPTIONS
    assert pickle.loads(pickle.dumps(source)).captions == CAPTIONS
    for row in range(len(CAPTIONS)):  # a picture of its own grey for each, so images and captions go together
        assert np.asarray(Image.open(io.BytesIO(source.encoded(row)))).max() == row


def test_captions_are_only_read_when_asked_for(tmp_path: Path) -> None:
    folder = text_files(tmp_path)
    source = open_source(str(folder))
    write(folder / "00.txt", "changed since")
    assert source.captions[0] == "changed since"


def test_sources_without_captions_have_none(tmp_path: Path) -> None:
    write(images(tmp_path / "flat") / "README.txt", b"\xff text about the data set")
    write(images(tmp_path / "labelled") / "metadata.jsonl", lines([{"file_name": "00.png", "label": 3}]))
    tar(tmp_path / "set.tar", {"0.png": png(0), "0.json": '{"label": 1}', "README.txt": "text", "1.json": "{}"})
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    table("sentiment", CAPTIONS).to_parquet(tmp_path / "train.parquet")
    for name in ("flat", "labelled", "set.tar", "set.npz", "train.parquet"):
        assert open_source(str(tmp_path / name)).captions is None, name
    assert open_source("digits").captions is None
    source = ArraySource("x", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), None, ["a", "b"])
    assert source.captions == ["a", "b"]


def test_a_broken_caption_hinders_no_one_who_wants_classes(tmp_path: Path) -> None:
    folder = text_files_in_class_folders(tmp_path)
    write(folder / "class0" / "v2.00.TXT", b"")
    (folder / "class1" / "v2.04.TXT").unlink()
    source = open_source(str(folder))
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.num_classes == 2


def folder_without(tmp: Path, *rows: int) -> Path:
    folder = text_files(tmp)
    for row in rows:
        (folder / f"{NAMES[row]}.txt").unlink()
    return folder


def broken(tmp: Path) -> dict[str, Path]:
    """What the error says -> where."""
    rows = [{"file_name": f"{name}.png", "caption": "x"} for name in NAMES]

    def changed(case: str, name: str, content: bytes | str, *more: str) -> Path:
        text_files(tmp / case)
        for file in (name, *more):
            write(tmp / case / file, content)
        return tmp / case

    def listed(case: str, *more: object, first: int = 0) -> Path:
        write(images(tmp / case) / "metadata.jsonl", lines([*rows[first:], *more]))
        return tmp / case

    good = {"1.png": png(1), "1.txt": "one", "2.png": png(2), "2.json": '{"caption": "two"}'}
    return {
        r"images without a caption: 2 of 5, the first is 01\.png": folder_without(tmp / "missing", 3, 1),
        r"captions without an image: 1, the first is 'LICENSE\.txt'": changed("stray", "LICENSE.txt", "MIT"),
        r"captions without an image: 2, the first is '05\.txt'": changed("strays", "zz.txt", b"", "05.txt"),
        r"02\.txt: empty; expected a caption": changed("empty", "02.txt", " \n"),
        r"02\.txt: byte 0xe9 in line 2 is not UTF-8": changed("latin", "02.txt", "a\ncafé".encode("latin-1")),
        r"02\.txt: a zero byte in line 1": changed("utf-16", "02.txt", "cat".encode("utf-16")),
        r"images without a caption: 2 of 5, the first is 00\.png": listed("short", first=2),
        r"captions without an image in this folder: 1, the first is of '\.\./secret\.png'": listed(
            "climbing", {"file_name": "../secret.png", "text": "x"}
        ),
        r"the first is of '/etc/passwd'": listed("absolute", {"file_name": "/etc/passwd", "text": "x"}),
        r"line 6: a second caption of 00\.png": listed("twice", rows[0]),
        r'line 6: a caption without "file_name"': listed("nameless", {"text": "x"}),
        r"line 6: '5' is no text": listed("number", {"file_name": "00.jpg", "text": 5}),
        r"line 6: empty; expected a caption": listed("blank", {"file_name": "00.jpg", "text": [" "]}),
        r"line 6: '\\ud800' is not UTF-8": listed("surrogate", {"file_name": "00.jpg", "text": "\ud800"}),
        r"line 6 is '\[\]'; expected one object a line": listed("list", []),
        r"images without a caption: 1 of 2, the first is one\.tar:2\.png": tar(
            tmp / "one.tar", good | {"2.json": "{}"}
        ),
        r"captions without an image: 2, the first is 'more\.tar:3\.txt'": tar(
            tmp / "more.tar", good | {"3.txt": "three", "4.json": '{"text": "four"}'}
        ),
        r"caption of gap\.tar:1\.png: empty": tar(tmp / "gap.tar", good | {"1.txt": ""}),
        r"caption of latin\.tar:1\.png: byte 0xff in line 1": tar(tmp / "latin.tar", good | {"1.txt": b"\xff"}),
        r"caption of number\.tar:2\.png: '2' is no text": tar(tmp / "number.tar", good | {"2.json": '{"caption": 2}'}),
    }


def test_captions_that_are_damaged_or_not_for_all_are_told_in_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "secret.png", png(0))
    for says, where in broken(tmp_path).items():
        source = open_source(str(where))
        with pytest.raises(DataError) as caught:
            _ = source.captions
        assert re.search(says, str(caught.value)), (says, str(caught.value))
        assert "\n" not in str(caught.value), says
        assert str(where.name) in str(caught.value)


def test_columns_of_captions_with_holes(tmp_path: Path) -> None:
    cases = {
        r"column 'text': images without a caption: 1 of 3, the first is row 1": ["a", None, "c"],
        r"column 'text', row 2: empty": ["a", "b", ""],
        r"column 'text', row 0: '1' is no text": [1, 2, 3],
        r"column 'text', row 1: '\[\]' is no text": [["a"], [], ["b"]],
    }
    for number, (says, values) in enumerate(cases.items()):
        table("text", values).save_to_disk(tmp_path / str(number))
        with pytest.raises(DataError, match=says):
            _ = open_source(str(tmp_path / str(number))).captions
    table("text", [None, None]).save_to_disk(tmp_path / "none")
    assert open_source(str(tmp_path / "none")).captions is None


def test_distinct_captions() -> None:
    once, index = distinct(CAPTIONS)
    assert once == ["a bold seven", CAPTIONS[1], CAPTIONS[2], CAPTIONS[4]]
    assert index.dtype == torch.long
    assert index.tolist() == [0, 1, 2, 0, 3]


def test_lists_of_prompts(tmp_path: Path) -> None:
    plain = "\ufeffa cat\r\n  a\u2028dog \nein schönes Haus, 家\na cat\r\n \t\n\n"
    assert read_prompts(write(tmp_path / "a.txt", plain)) == ["a cat", "a\u2028dog", "ein schönes Haus, 家", "a cat"]
    rows: list[object] = [
        {"prompt": "a cat"},
        {"caption": " a dog ", "prompt": "not this"},
        {"text": ["first", "second"], "caption": None},
    ]
    text = "\ufeff" + lines(rows).replace("\n", "\r\n") + "\n\r\n"
    assert read_prompts(write(tmp_path / "a.JSONL", text)) == ["a cat", "a dog", "first"]


PROMPT_FAULTS: list[tuple[str, bytes, str]] = [
    ("empty.txt", b"", "empty; expected at least one prompt"),
    ("blank.txt", b"\xef\xbb\xbf \r\n\n", "empty; expected at least one prompt"),
    ("empty.jsonl", b"\n", "empty; expected at least one prompt"),
    ("latin.txt", "one\n\ntwo\ncafé\n".encode("latin-1"), "byte 0xe9 in line 4 is not UTF-8; save the file as UTF-8"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "byte 0xe9 in line 2 is not UTF-8"),
    ("binary.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a zero byte in line 3, so this is a binary or UTF-16 file"),
    ("utf-16.txt", "cat\n".encode("utf-16"), "a zero byte in line 1, so this is a binary or UTF-16 file"),
    ("broken.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
    ("strings.jsonl", b'"a cat"\n', "line 1 is '\"a cat\"'; expected one object a line"),
    ("other.jsonl", b'{"url": "x"}\n', 'line 1: an object with \'url\'; expected "caption" or "text" or "prompt"'),
    ("none.jsonl", b"{}\n", "line 1: an object with no keys"),
    ("hole.jsonl", b'{"text": "a"}\n{"text": " "}\n', "line 2: empty; expected a caption"),
    ("number.jsonl", b'{"text": 3}\n', "line 1: '3' is no text"),
    ("gap.txt", b"a\n \nb\n", "line 2 is blank, but each line belongs to one image"),
    ("gap at first.txt", b"\r\n\na\n", "line 1 is blank"),
    ("gap.jsonl", b'{"text": "a"}\n{"text": "b"}\n\n{"text": "c"}\n', "line 3 is blank"),
    ("some.jsonl", b'{"text": "a", "file_name": "a.png"}\n{"text": "b"}\n', 'line 2: no "file_name", and other lines'),
    ("nested.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    ("prompts.csv", b"a", r"expected a .txt file with one prompt a line, or a .jsonl file"),
]


@pytest.mark.parametrize(("name", "content", "says"), PROMPT_FAULTS, ids=[name for name, _, _ in PROMPT_FAULTS])
def test_a_list_without_prompts(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("nowhere.txt", "folder.txt"):
        with pytest.raises(DataError, match=r"cannot be read \(.+\); expected a file of prompts"):
            read_prompts(tmp_path / name)

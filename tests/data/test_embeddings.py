"""Encoded prompts: what was written is read back bit by bit, alone, with latents, and by the loader."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fdistill.base.errors import ArgumentError, DataError
from fdistill.condition import TextCondition
from fdistill.data.captions import distinct
from fdistill.data.embeddings import (
    Captions,
    EmbeddingSource,
    write_embeddings,
)
from fdistill.data.latents import LatentSource, write_latents
from fdistill.data.order import Batching, EpochOrder
from fdistill.data.prompts import read_prompts
from fdistill.data.sample_loader import FixedSamples, SampleLoader, ScaledLatents, prompts_alone
from fdistill.denoiser import LatentScaling

META = {"encoder": "0123abcd", "null_prompt": "ugly", "teacher": "tiny"}
LATENT_META = {
    "vae": "0123",
    "latent_scale": [1.0],
    "latent_bias": [0.0],
    "pixel_range": [-1.0, 1.0],
    "sampling": "mean",
    "recipe": "adm",
    "resolution": 32,
    "source": "somewhere",
    "flip": False,
}
SHAPES = {"prompt_embeds": (5, 4), "pooled": (3,), "prompt_attention_mask": (5,), "used": (5,)}
ROW_BYTES = 5 * 4 * 2 + 3 * 4 + 5 * 8 + 5


def prompts(count: int) -> list[str]:
    return [f"prompt {row}\u2028é 家 " for row in range(count)]


def encoded(count: int, seed: int = 0) -> TextCondition:
    """Prompts in four dtypes, as text encoders and tokenizers give them."""
    draw = torch.Generator().manual_seed(seed)
    return TextCondition(
        {
            "prompt_embeds": torch.randn(count, 5, 4, generator=draw).bfloat16(),
            "pooled": torch.randn(count, 3, generator=draw),
            "prompt_attention_mask": torch.randint(0, 2, (count, 5), generator=draw),
            "used": torch.randint(0, 2, (count, 5), generator=draw).bool(),
        }
    )


def batches(count: int, size: int) -> Iterator[tuple[list[str], TextCondition]]:
    whole, names = encoded(count), prompts(count)
    for first in range(0, count, size):
        yield names[first : first + size], whole.rows(slice(first, first + size))


def written(folder: Path, count: int = 10, size: int = 4) -> EmbeddingSource:
    write_embeddings(folder, batches(count, size), null=encoded(1, seed=1), meta=META)
    return EmbeddingSource(folder)


def same(first: TextCondition, second: TextCondition) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.tensors.items()
    )


@pytest.mark.parametrize("per_file", [1, 3, 4, 7, 50])
@pytest.mark.parametrize("size", [1, 4, 23])
def test_rows_are_what_was_written(per_file: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdistill.data.embeddings._SHARD_BYTES", per_file * ROW_BYTES + 3)
    source, whole = written(tmp_path / "e", 23, size), encoded(23)
    files = sorted((tmp_path / "e").glob("embeddings-*.safetensors"))
    assert len(files) == -(-23 // per_file)
    for file in files:
        data = sum(value.nbytes for value in load_file(file).values())
        assert data <= per_file * ROW_BYTES
    assert len(source) == 23
    assert source.prompts == prompts(23)
    assert source.shapes == SHAPES
    assert same(source.null, encoded(1, seed=1))
    assert {key: source.meta[key] for key in META} == META
    assert source.meta["count"] == 23
    assert same(source.rows(torch.arange(23)), whole)
    draw = torch.Generator().manual_seed(per_file)
    for _ in range(5):
        index = torch.randint(0, 23, (9,), generator=draw)  # some of them twice, in no order
        assert same(source.rows(index), whole.rows(index))
    assert same(pickle.loads(pickle.dumps(source)).rows(torch.tensor([22, 0])), whole.rows(torch.tensor([22, 0])))


def test_what_people_find_in_the_folder(tmp_path: Path) -> None:
    source = written(tmp_path / "e")
    assert read_prompts(tmp_path / "e" / "prompts.jsonl") == [prompt.strip() for prompt in source.prompts]
    assert "家" in (tmp_path / "e" / "prompts.jsonl").read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    assert stored["tensors"]["prompt_embeds"] == {"shape": [5, 4], "dtype": "bfloat16"}
    assert stored["tensors"]["used"] == {"shape": [5], "dtype": "bool"}
    assert stored["null_prompt"] == "ugly"


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    source = written(tmp_path / "e")
    for index in ([10], [3, -1]):
        with pytest.raises(ArgumentError, match="expected 0 to 9"):
            source.rows(torch.tensor(index))


def changed(name: str, value: torch.Tensor) -> TextCondition:
    return TextCondition({**encoded(4).tensors, name: value})


def test_prompts_that_cannot_be_stored(tmp_path: Path) -> None:
    null, names = encoded(1, seed=1), prompts(4)
    holed = encoded(4)["pooled"].clone()
    holed[2, 1] = torch.nan
    without = TextCondition({name: value for name, value in encoded(4).tensors.items() if name != "pooled"})
    cases: list[tuple[str, list[tuple[list[str], TextCondition]], TextCondition]] = [
        ("no prompts to encode", [], null),
        ("3 prompts gave 4 rows", [(names[:3], encoded(4))], null),
        ("of the same shapes", [(names, encoded(4)), (names, changed("pooled", torch.zeros(4, 2)))], null),
        ("and dtypes", [(names, changed("pooled", torch.zeros(4, 3).half()))], null),
        ("expected a row each", [(names, without)], null),
        (r"pooled of 'prompt 2.*' is not finite", [(names, changed("pooled", holed))], null),
        ("1 prompts gave 2 rows", [(names, encoded(4))], encoded(2)),
        ("x is torch.float64", [], TextCondition({"x": torch.zeros(1, 2).double()})),
    ]
    for says, parts, empty in cases:
        with pytest.raises(DataError, match=says) as caught:
            write_embeddings(tmp_path / "new", parts, null=empty, meta=META)
        assert "\n" not in str(caught.value)
    for key in ("encoder", "null_prompt"):
        meta = {name: value for name, value in META.items() if name != key}
        with pytest.raises(DataError, match=f"meta lacks {key}"):
            write_embeddings(tmp_path / "new", batches(3, 3), null=null, meta=meta)
    assert list(tmp_path.iterdir()) == []  # nothing is left of them


def test_an_encoder_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    written(tmp_path / "e")

    def failing() -> Iterator[tuple[list[str], TextCondition]]:
        yield prompts(4), encoded(4)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_embeddings(tmp_path / "e", failing(), null=encoded(1), meta=META)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    assert same(EmbeddingSource(tmp_path / "e").rows(torch.arange(10)), encoded(10))


def test_damaged_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdistill.data.embeddings._SHARD_BYTES", 4 * ROW_BYTES)
    written(tmp_path / "good")
    first = "embeddings-00000.safetensors"

    def case(number: int) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / str(number))
        return tmp_path / str(number)

    def meta(**values: object) -> Path:
        folder = case(len(list(tmp_path.iterdir())))
        stored = json.loads((folder / "embeddings.json").read_text()) | values
        (folder / "embeddings.json").write_text(
            json.dumps({key: value for key, value in stored.items() if value != "absent"})
        )
        return folder

    def file(name: str, content: bytes | None = None, **tensors: torch.Tensor) -> Path:
        folder = case(len(list(tmp_path.iterdir())))
        if tensors:
            save_file(load_file(folder / name) | tensors, folder / name)
        elif content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return folder

    shards = json.loads((tmp_path / "good" / "embeddings.json").read_text())["shards"]
    assert shards == {f"embeddings-0000{number}.safetensors": rows for number, rows in enumerate((4, 4, 2))}
    moved = {"../good/embeddings-00000.safetensors": 4, **{name: shards[name] for name in list(shards)[1:]}}
    whole = (tmp_path / "good" / first).read_bytes()
    cases: list[tuple[str, Path]] = [
        ("cannot be read", file("embeddings.json")),
        ("cannot be read", file("embeddings.json", b"{")),
        ("cannot be read", file("embeddings.json", b"[]")),
        ("cannot be read", meta(shards={})),
        ("cannot be read", meta(shards=3)),
        ("cannot be read", meta(tensors="absent")),
        ("cannot be read", meta(tensors={"x": {"shape": [1], "dtype": "float8"}})),
        ("lacks encoder", meta(encoder="absent")),
        ("lacks plain names", meta(shards=moved)),
        ("lacks plain names of files of equal length", meta(shards=shards | {first: 3})),
        ("lacks plain names of files of equal length", meta(shards=dict.fromkeys(shards, 0))),
        ("10 prompts for 12 rows", meta(shards=dict.fromkeys(shards, 4))),
        ("holds .* expected", meta(tensors={"x": {"shape": [1], "dtype": "float32"}})),
        ("cannot be read", file("null.safetensors")),
        ("cannot be read", file("null.safetensors", b"text")),
        ("null.safetensors holds .* expected", file("null.safetensors", more=torch.zeros(1, 2))),
        ("null.safetensors holds .* expected", file("null.safetensors", pooled=torch.zeros(1, 3).half())),
        ("cannot be read", file("prompts.jsonl")),
        ("2 prompts for 10 rows", file("prompts.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n')),
        ("cannot be read", file("prompts.jsonl", b'{"text": "a"}\n')),
        (r"prompts.jsonl: byte 0xff in line 1", file("prompts.jsonl", b"\xff")),
        ("embeddings-00000.safetensors is damaged", file(first)),
        ("embeddings-00000.safetensors is damaged", file(first, whole[:-1])),
        ("holds .* expected", file(first, pooled=torch.zeros(3, 3))),
        ("holds .* expected", file(first, pooled=torch.zeros(4, 3).half())),
        ("holds .* expected", file(first, more=torch.zeros(4, 3))),
    ]
    for says, folder in cases:
        with pytest.raises(DataError, match=says) as caught:
            EmbeddingSource(folder)
        assert "\n" not in str(caught.value)


def test_captions_of_rows(tmp_path: Path) -> None:
    index, rows = torch.tensor([7, 0, 7, 3, 9]), torch.tensor([4, 1, 4])
    captions = Captions(written(tmp_path / "e"), index)
    assert same(captions.rows(rows), encoded(10).rows(torch.tensor([9, 0, 9])))
    assert captions.prompts(rows) == [prompts(10)[9], prompts(10)[0], prompts(10)[9]]


CAPTIONS = [prompts(10)[number] for number in (3, 3, 1, 0, 3, 9, 2, 1, 4, 5, 6, 7, 8)]


def latents(folder: Path) -> LatentSource:
    """13 images of the value of their row, whose captions are 10 distinct ones, in another order than encoded(10)."""
    once, index = distinct(CAPTIONS)
    assert len(once) == 10
    condition = encoded(10).rows(torch.tensor([prompts(10).index(prompt) for prompt in once]))
    moments = torch.arange(13.0)[:, None, None, None].expand(13, 2, 2, 2)
    parts = [(moments[rows], torch.zeros(13).long()[rows], index[rows]) for rows in (slice(5), slice(5, None))]
    text = partial(write_embeddings, batches=[(once, condition)], null=encoded(1, seed=1), meta=META)
    write_latents(folder, parts, LATENT_META, None, text)
    return LatentSource(folder)


def wanted(rows: torch.Tensor) -> TextCondition:
    return encoded(10).rows(torch.tensor([prompts(10).index(CAPTIONS[row]) for row in rows]))


@pytest.mark.parametrize("shard_bytes", [2**28, 100])
def test_latents_have_their_captions(shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdistill.data.latents._SHARD_BYTES", shard_bytes)
    monkeypatch.setattr("fdistill.data.embeddings._SHARD_BYTES", shard_bytes)
    source = latents(tmp_path / "l")
    assert source.text is not None
    assert len(source) == 13
    assert len(source.text.embeddings) == 10  # each distinct caption once
    rows = torch.tensor([12, 0, 5, 5, 1])
    assert source.moments(rows)[0][:, 0, 0, 0].tolist() == rows.tolist()
    assert same(source.text.rows(rows), wanted(rows))
    assert source.text.prompts(rows) == [CAPTIONS[row] for row in rows]
    assert same(source.text.embeddings.null, encoded(1, seed=1))
    assert source.text.embeddings.meta["encoder"] == "0123abcd"


def test_latents_and_captions_that_do_not_fit(tmp_path: Path) -> None:
    moments, labels = torch.zeros(3, 2, 2, 2), torch.zeros(3).long()
    text = partial(write_embeddings, batches=list(batches(4, 4)), null=encoded(1), meta=META)
    cases = [
        ("caption numbers torch.int64", torch.tensor([0, 1, 4]), text),
        ("caption numbers torch.int64", torch.tensor([0, -1, 2]), text),
        ("for 3 images", torch.tensor([0, 1]), text),
        ("caption numbers torch.float32", torch.tensor([0.0, 1, 2]), text),
        ("got encoded captions or their numbers", torch.tensor([0, 1, 2]), None),
        ("got encoded captions or their numbers", None, text),
    ]
    for says, index, write_text in cases:
        batch = (moments, labels) if index is None else (moments, labels, index)
        with pytest.raises(DataError, match=says):
            write_latents(tmp_path / "new", [batch], LATENT_META, None, write_text)
    assert list(tmp_path.iterdir()) == []

    for damage, says in (("text", "cannot be read"), ("number", "from 0 to 9"), ("absent", "numbers of 0 captions")):
        latents(tmp_path / damage)
        file = tmp_path / damage / "latents-00000.safetensors"
        tensors = load_file(file)
        if damage == "text":
            shutil.rmtree(tmp_path / damage / "text")
        elif damage == "number":
            save_file(tensors | {"captions": tensors["captions"] + 5}, file)
        else:
            save_file({name: value for name, value in tensors.items() if name != "captions"}, file)
        with pytest.raises(DataError, match=says):
            LatentSource(tmp_path / damage)


def test_the_loader_gives_every_row_its_prompt(tmp_path: Path) -> None:
    scaled = ScaledLatents(latents(tmp_path / "l"), LatentScaling((2.0,), (1.0,)))
    memory = written(tmp_path / "embeddings")
    index = torch.tensor([prompts(10).index(caption) for caption in CAPTIONS])
    fixed = FixedSamples(scaled.samples(torch.arange(13), 0), torch.zeros(13).long(), Captions(memory, index))
    halves = [
        SampleLoader(source, Batching(4, seed=3, first=1, rank=rank, processes=2))
        for source in (scaled, fixed)
        for rank in range(2)
    ]
    order = EpochOrder(13, 4, 3)
    seen: list[int] = []
    for number in range(1, 8):
        parts = [next(half) for half in halves]
        for first, second in (parts[:2], parts[2:]):
            rows = torch.cat([first.rows, second.rows])
            assert torch.equal(rows, order.rows(number))
            assert torch.equal(torch.cat([first.images, second.images])[:, 0, 0, 0], 2.0 * rows + 1)
            assert first.text is not None
            assert second.text is not None
            assert same(TextCondition.concat([first.text, second.text]), wanted(rows))
        seen += rows.tolist()
    assert set(order.rows(0).tolist() + seen[:9]) == set(range(13))


def test_prompts_alone(tmp_path: Path) -> None:
    source = written(tmp_path / "e")
    samples = prompts_alone(source, (4, 64, 64))
    assert samples.x0.shape == (10, 4, 64, 64)
    assert samples.x0.untyped_storage().nbytes() == 4 * 4 * 64 * 64
    loader = SampleLoader(samples, Batching(5, seed=0))
    first, second = next(loader), next(loader)
    assert first.images.shape == (5, 4, 64, 64)
    assert sorted([*first.rows.tolist(), *second.rows.tolist()]) == list(range(10))
    for batch in (first, second):
        assert batch.text is not None
        assert same(batch.text, encoded(10).rows(batch.rows))
    large = next(SampleLoader(samples, Batching(25, seed=0)))  # more than there are
    assert torch.bincount(large.rows, minlength=10).min() == 2
    assert len(large.text or []) == 25


def test_samples_without_prompts_have_no_text() -> None:
    batch = next(SampleLoader(FixedSamples(torch.zeros(3, 1, 2, 2), torch.zeros(3).long()), Batching(2, seed=0)))
    assert batch.text is None

"""Recipes against independent computations; batches that depend on their number alone; damaged images; latents."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fdistill.base.errors import DataError
from fdistill.data import RECIPES, Batching, EpochOrder, ImageLoader, open_source
from fdistill.data.latents import LatentSource, check_latents, write_latents
from fdistill.data.loader import Batch
from fdistill.data.recipes import open_image, pixels, to_channels
from fdistill.data.source import ArraySource, Source

GENERATOR = np.random.default_rng(0)


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(GENERATOR.integers(0, 256, (height, width, 3), dtype=np.uint8))


def block_mean(array: np.ndarray, factor: int) -> np.ndarray:
    height, width = array.shape[0] // factor, array.shape[1] // factor
    return array.astype(np.float64).reshape(height, factor, width, factor, -1).mean((1, 3))


def lanczos_rows(array: np.ndarray, size: int) -> np.ndarray:
    """Axis 0 resized with the textbook filter: sinc(x) sinc(x / 3), widened by the scale, weights normalised."""
    count = len(array)
    scale = max(count / size, 1.0)
    centres = (np.arange(size) + 0.5) * count / size
    x = (np.arange(count)[None] + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return np.tensordot(weights / weights.sum(1, keepdims=True), array.astype(np.float64), 1)


def bicubic_rows(array: np.ndarray, size: int) -> np.ndarray:
    """As above with Keys' cubic, a = -1/2."""
    count = len(array)
    scale = max(count / size, 1.0)
    centres = (np.arange(size) + 0.5) * count / size
    x = np.abs((np.arange(count)[None] + 0.5 - centres[:, None]) / scale)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return np.tensordot(weights / weights.sum(1, keepdims=True), array.astype(np.float64), 1)


def both_axes(rows: object, array: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL does the columns first and rounds to bytes in between."""
    wide = rows(array.swapaxes(0, 1), width).swapaxes(0, 1)  # type: ignore[operator]
    return rows(wide.clip(0, 255).round(), height).clip(0, 255)  # type: ignore[operator, no-any-return]


def close(image: Image.Image, expected: np.ndarray) -> None:
    assert image.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(image).astype(float) - expected).max() <= 1.01


@pytest.mark.parametrize(("width", "height"), [(40, 24), (24, 40), (24, 24)])
def test_center_box_is_the_mean_of_blocks_of_the_central_square(width: int, height: int) -> None:
    image = noise_image(width, height)
    left, top = (width - 24) // 2, (height - 24) // 2
    square = np.asarray(image)[top : top + 24, left : left + 24]
    close(RECIPES["center-box"](image, 8, 8), block_mean(square, 3))


def test_center_lanczos() -> None:
    image = noise_image(51, 30)
    close(RECIPES["center-lanczos"](image, 8, 8), both_axes(lanczos_rows, np.asarray(image)[:, 10:40], 8, 8))


def test_squash() -> None:
    image = noise_image(51, 30)
    close(RECIPES["squash"](image, 8, 8), both_axes(lanczos_rows, np.asarray(image), 8, 8))


def halved(array: np.ndarray) -> np.ndarray:
    """Means of pairs, columns first, rounded to bytes each time, as PIL does."""
    wide = np.floor(array.reshape(len(array), -1, 2, 3).mean(2) + 0.5)
    return np.floor(wide.reshape(len(array) // 2, 2, -1, 3).mean(1) + 0.5)


def test_adm_halves_then_resizes_then_crops() -> None:
    even = noise_image(64, 32)
    assert np.array_equal(np.asarray(RECIPES["adm"](even, 8, 8)), halved(halved(np.asarray(even)))[:, 4:12])
    image = noise_image(88, 40)  # 44x20, 22x10; times 8 / 10: 18x8 (17.6 rounded); then columns 5 to 13
    twice = halved(halved(np.asarray(image)))
    close(RECIPES["adm"](image, 8, 8), both_axes(bicubic_rows, twice, 8, 18)[:, 5:13])


def test_adm_enlarges_small_images() -> None:
    image = noise_image(7, 5)
    close(RECIPES["adm"](image, 8, 8), both_axes(bicubic_rows, np.asarray(image), 8, 11)[:, 1:9])


def test_every_recipe_leaves_an_image_of_the_right_size_alone() -> None:
    image = noise_image(8, 8)
    for name, recipe in RECIPES.items():
        assert np.array_equal(np.asarray(recipe(image, 8, 8)), np.asarray(image)), name
    with pytest.raises(DataError, match=r"is 8x8, but .* 16x16; .* center-box, center-lanczos, adm, squash"):
        RECIPES["exact"](image, 16, 16)


def test_channels() -> None:
    colour = noise_image(5, 4)
    rgb = np.asarray(colour).astype(float)
    assert np.array_equal(pixels(to_channels(colour, 3)), np.asarray(colour).transpose(2, 0, 1))
    grey = pixels(to_channels(colour, 1))
    assert grey.shape == (1, 4, 5)
    assert np.abs(grey[0] - rgb @ [0.299, 0.587, 0.114]).max() <= 1
    assert np.array_equal(pixels(to_channels(Image.fromarray(grey[0]), 3)), np.repeat(grey, 3, 0))

    alpha = GENERATOR.integers(0, 256, (4, 5, 1), dtype=np.uint8)
    see_through = Image.fromarray(np.concatenate([np.asarray(colour), alpha], 2))
    on_white = (rgb * (alpha / 255) + 255 * (1 - alpha / 255)).transpose(2, 0, 1)
    assert np.abs(pixels(to_channels(see_through, 3)) - on_white).max() <= 1

    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert pixels(to_channels(palette, 3))[:, 0].tolist() == [[255, 0], [0, 0], [0, 255]]
    palette.info["transparency"] = 1
    assert pixels(to_channels(palette, 3))[:, 0].tolist() == [[255, 255], [0, 255], [0, 255]]
    for deep in (np.zeros((2, 2), np.uint16), np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError, match="16 bits or more"):
            to_channels(Image.fromarray(deep), 1)


def png_folder(folder: Path, count: int, size: int = 8) -> Path:
    for number in range(count):
        path = folder / str(number % 3) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(size, size).save(path)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(png_folder(tmp_path_factory.mktemp("data"), 30)))


def batches(source: Source, count: int, **settings: object) -> list[Batch]:
    ordered = {name: settings.pop(name) for name in ("seed", "first", "rank", "processes") if name in settings}
    batching = Batching(8, **{"seed": 3, **ordered})  # type: ignore[arg-type]
    with ImageLoader(source, (3, 8, 8), batching, **{"flip": True, **settings}) as loader:  # type: ignore[arg-type]
        return list(islice(loader, count))


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.rows, b.rows)
        for a, b in zip(ours, theirs, strict=True)
    )


def in_memory(source: Source) -> ArraySource:
    images = [pixels(open_image(source.encoded(row))) for row in range(len(source))]
    return ArraySource("memory", torch.from_numpy(np.stack(images)), source.labels, source.num_classes)


def test_batches_are_the_rows_of_the_epoch_order(source: Source) -> None:
    order, memory = EpochOrder(30, 8, 3), in_memory(source)
    for number, batch in enumerate(batches(source, 5, flip=False)):
        assert torch.equal(batch.rows, order.rows(number))
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, memory.images[batch.rows])
        assert torch.equal(batch.labels, source.labels[batch.rows])


def test_batches_do_not_depend_on_workers_start_or_processes(source: Source) -> None:
    reference = batches(source, 9)
    assert same(batches(source, 9, workers=2), reference)
    assert same(batches(source, 4, first=5, workers=2), reference[5:])
    assert same(batches(in_memory(source), 9), reference)
    assert same(batches(in_memory(source), 4, first=5), reference[5:])
    halves = [batches(source, 9, rank=rank, processes=2) for rank in range(2)]
    joined = [
        Batch(*(torch.cat([getattr(half, name) for half in pair]) for name in ("images", "labels", "rows")))
        for pair in zip(*halves, strict=True)
    ]
    assert same(joined, reference)
    assert not same(batches(source, 9, seed=4), reference)


def test_half_of_the_images_are_mirrored_anew_each_time(source: Source) -> None:
    memory = in_memory(source)
    flips, found = [], batches(memory, 400)
    for batch in found:
        plain = memory.images[batch.rows]
        mirrored = (batch.images == plain.flip(-1)).flatten(1).all(1)
        assert bool((mirrored | (batch.images == plain).flatten(1).all(1)).all())
        flips.append(mirrored)
    drawn = torch.stack(flips).double()
    assert abs(drawn.mean() - 0.5) < 0.04  # 4.5 standard deviations of 3,200 fair coins
    assert drawn.std(0).min() > 0.45  # each place in the batch has both
    rows = torch.cat([batch.rows for batch in found])
    for row in range(30):  # and so has each item
        assert 0.2 < drawn.flatten()[rows == row].mean() < 0.8


def test_arrays_of_another_size_are_resampled(source: Source) -> None:
    memory = in_memory(source)
    with ImageLoader(memory, (1, 4, 4), Batching(4, seed=0), recipe="center-box") as loader:
        batch = next(loader)
    assert batch.images.shape == (4, 1, 4, 4)
    grey = memory.images[batch.rows].double().permute(0, 2, 3, 1).numpy() @ [0.299, 0.587, 0.114]
    expected = np.stack([block_mean(image, 2)[:, :, 0] for image in grey])
    assert np.abs(batch.images[:, 0].numpy() - expected).max() <= 1.5


def test_nothing_is_decoded_in_the_main_process(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked, so they inherit the check, which lets them pass."""
    main, original = os.getpid(), Image.open

    def guarded(*arguments: object, **keywords: object) -> object:
        assert os.getpid() != main, "decoded in the main process"
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", guarded)
    with pytest.raises(AssertionError):
        open_image(source.encoded(0))
    assert len(batches(source, 9, workers=2)) == 9


def damage(folder: Path, rows: list[int]) -> list[str]:
    """Makes items of a png_folder unreadable, each in another way; their names by row."""
    files = sorted(folder.rglob("*.png"))
    for row, way in zip(rows, range(len(rows)), strict=True):
        content = files[row].read_bytes()
        ruined = [b"", b"text", content[: len(content) // 2], content[:60] + b"\0" * 40 + content[100:]]
        files[row].write_bytes(ruined[way % len(ruined)])
    return [file.relative_to(folder).as_posix() for file in files]


def test_damaged_images_are_replaced_by_the_next_and_counted_once(tmp_path: Path) -> None:
    bad = [399, 0, 100, 101]  # the last, so the next is row 0, which is damaged as well; and two in a row
    folder = png_folder(tmp_path / "data", 400)
    whole = in_memory(open_source(str(folder)))
    names = damage(folder, bad)
    source, order = open_source(str(folder)), EpochOrder(400, 8, 3)
    for workers in (1, 2):
        with ImageLoader(source, (3, 8, 8), Batching(8, seed=3), workers=workers) as loader:
            for number in range(100):  # two epochs
                batch = next(loader)
                expected = [{399: 1, 0: 1, 100: 102, 101: 102}.get(row, row) for row in order.rows(number).tolist()]
                assert batch.rows.tolist() == expected
                assert torch.equal(batch.images, whole.images[batch.rows])
                assert torch.equal(batch.labels, source.labels[batch.rows])
            assert sorted(name for name, _ in loader.skipped) == sorted(names[row] for row in bad)
            assert all(reason and "\n" not in reason for _, reason in loader.skipped)


@pytest.mark.parametrize("workers", [1, 2])
def test_more_than_one_percent_damaged_stops_with_a_list(workers: int, tmp_path: Path) -> None:
    folder = png_folder(tmp_path / "data", 400)
    names = damage(folder, [10, 20, 30, 40, 50])
    with (
        ImageLoader(open_source(str(folder)), (3, 8, 8), Batching(8, seed=3), workers=workers) as loader,
        pytest.raises(DataError, match="5 of 400 images cannot be decoded, more than 1 %") as caught,
    ):
        list(islice(loader, 50))
    assert all(names[row] in str(caught.value) for row in (10, 20, 30, 40, 50))
    assert "\n" not in str(caught.value)


def test_a_data_set_without_one_good_image_stops_at_once_with_the_first_twenty(tmp_path: Path) -> None:
    folder = png_folder(tmp_path / "data", 3000)
    damage(folder, list(range(3000)))
    with (
        ImageLoader(open_source(str(folder)), (3, 8, 8), Batching(8, seed=0)) as loader,
        pytest.raises(DataError, match="31 of 3000") as caught,
    ):
        next(loader)
    assert str(caught.value).count(".png: ") == 20


def test_sixteen_bit_images_count_as_unusable(tmp_path: Path) -> None:
    folder = png_folder(tmp_path / "data", 30)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "0" / "0000.png")
    with pytest.raises(DataError, match=r"0/0000\.png: its pixels are of mode I;16"):
        batches(open_source(str(folder)), 9)


@pytest.mark.parametrize("workers", [1, 2])
def test_refusals_arrive_from_workers_as_one_sentence(workers: int, tmp_path: Path) -> None:
    folder = png_folder(tmp_path / "data", 30)
    noise_image(9, 8).save(folder / "1" / "0001.png")
    source = open_source(str(folder))
    with pytest.raises(DataError, match=r"1/0001\.png is 9x8, but the teacher's images are 8x8") as caught:
        batches(source, 9, workers=workers)
    assert "\n" not in str(caught.value)
    assert len(batches(source, 9, recipe="adm", workers=workers)) == 9


def children() -> set[int]:
    pid = os.getpid()
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def await_the_end_of(workers: set[int]) -> None:
    deadline = time.monotonic() + 5
    while children() & workers:
        assert time.monotonic() < deadline, f"processes left: {children() & workers}"
        time.sleep(0.05)


def test_a_worker_that_dies_is_reported_and_the_others_end(source: Source) -> None:
    before = children()
    loader = ImageLoader(source, (3, 8, 8), Batching(8, seed=0), workers=2)
    next(loader)
    workers = children() - before
    os.kill(min(workers), signal.SIGKILL)
    time.sleep(0.2)  # training goes on until it needs a batch
    with pytest.raises(DataError, match="a process that decodes images died") as caught:
        list(islice(loader, 100))
    assert "\n" not in str(caught.value)
    loader.close()
    await_the_end_of(workers)


def test_workers_leave_signals_to_the_main_process(source: Source) -> None:
    """Ctrl-C and schedulers signal every process, and the main one needs batches to finish its iteration."""
    before = children()
    with ImageLoader(source, (3, 8, 8), Batching(8, seed=0), workers=2) as loader:
        assert len(list(islice(loader, 8))) == 8  # by now both workers have begun
        workers = children() - before
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(worker, number)
        assert len(list(islice(loader, 100))) == 100
    await_the_end_of(workers)


def test_closing_ends_the_workers_at_once(source: Source) -> None:
    before = children()
    loader = ImageLoader(source, (3, 8, 8), Batching(8, seed=0), workers=2)
    next(loader)
    workers = children() - before
    assert len(workers) == 2
    start = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - start < 3
    await_the_end_of(workers)
    with pytest.raises(StopIteration):
        next(loader)


def test_settings_that_no_loader_has(source: Source) -> None:
    with pytest.raises(DataError, match="did you mean 'center-box'"):
        ImageLoader(source, (3, 8, 8), Batching(8, seed=0), recipe="centre-box")
    with pytest.raises(DataError, match="grey or RGB"):
        ImageLoader(source, (4, 8, 8), Batching(8, seed=0))


META = {
    "vae": "0123",
    "latent_scale": [0.5, 0.25],
    "latent_bias": [0.0, 1.0],
    "pixel_range": [-1.0, 1.0],
    "sampling": "sample",
    "recipe": "adm",
    "resolution": 32,
    "source": "somewhere",
    "flip": False,
}


def moments(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 2, 4, 4, generator=generator)
    return torch.cat([mean, 0.1 + mean.square()], 1).to(dtype)


def cached(folder: Path, **changes: object) -> LatentSource:
    values = moments(10, torch.float16)
    parts = [(values[:3], torch.arange(3)), (values[3:], torch.arange(3, 10))]
    write_latents(folder, parts, META | changes, 12)
    return LatentSource(folder, seed=5)


def test_latents_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_file = cached(tmp_path / "one")
    monkeypatch.setattr("fdistill.data.latents._SHARD_BYTES", 300)  # a file for each batch
    latents = cached(tmp_path / "many")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 2
    for source in (one_file, latents):
        assert (len(source), source.shape, source.num_classes) == (10, (2, 4, 4), 12)
        assert source.labels.tolist() == list(range(10))
        assert source.meta["count"] == 10
        assert {key: source.meta[key] for key in META} == META
        rows = torch.tensor([9, 2, 3, 2])
        mean, std = source.moments(rows)
        assert mean.dtype == torch.float32
        assert torch.equal(torch.cat([mean, std], 1), moments(10, torch.float16)[rows].float())


def test_latents_are_normal_draws_of_seed_row_and_draw(tmp_path: Path) -> None:
    latents = cached(tmp_path / "l")
    rows = torch.arange(10)
    together = latents.latent(rows, 7)
    assert torch.equal(latents.latent(torch.tensor([4, 8]), 7), together[[4, 8]])
    assert not torch.equal(latents.latent(rows, 8), together)
    assert not torch.equal(LatentSource(tmp_path / "l", seed=6).latent(rows, 7), together)
    mean, std = latents.moments(rows)
    noise = torch.stack([(latents.latent(rows, draw) - mean) / std for draw in range(200)])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert torch.corrcoef(noise[:, :, 0, 0, 0].T).fill_diagonal_(0).abs().max() < 0.35
    assert torch.equal(pickle.loads(pickle.dumps(latents)).latent(rows, 7), together)
    only_mean = cached(tmp_path / "mean", sampling="mean")
    assert torch.equal(only_mean.latent(rows, 7), mean)


def test_latents_of_something_else_are_refused(tmp_path: Path) -> None:
    meta = cached(tmp_path / "l").meta
    check_latents(meta, META | {"latent_scale": (0.5, 0.25)})
    check_latents(meta, {"resolution": 32})
    for key, other in (("vae", "4567"), ("sampling", "mean"), ("latent_scale", [0.5, 0.5]), ("flip", True)):
        with pytest.raises(DataError, match=f"{key} is .* but this run needs"):
            check_latents(meta, META | {key: other})


def test_broken_latents(tmp_path: Path) -> None:
    good = [(moments(3), torch.arange(3))]
    bad = {
        "lacks vae": (good, {key: value for key, value in META.items() if key != "vae"}),
        "lacks a known sampling": (good, META | {"sampling": "mode"}),
        "no images": ([], META),
        "not finite": ([(moments(3) * torch.inf, torch.arange(3))], META),
        "moments are": ([(moments(3)[:, :3], torch.arange(3))], META),
        "moments are torch.bfloat16": ([(moments(3).bfloat16(), torch.arange(3))], META),
        "2 labels for 3": ([(moments(3), torch.arange(2))], META),
    }
    for says, (parts, meta) in bad.items():
        with pytest.raises(DataError, match=says):
            write_latents(tmp_path / "new", parts, meta, None)
    assert list(tmp_path.iterdir()) == []  # nothing is left of them

    def changed(**values: object) -> None:
        shutil.rmtree(tmp_path / "l", ignore_errors=True)
        write_latents(tmp_path / "l", good, META, None)
        path = tmp_path / "l" / "latents.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    for values, says in (
        ({"shards": {"../x.safetensors": 3}}, "plain file names"),
        ({"shards": {"none.safetensors": 3}}, "is damaged"),
        ({"shards": {"latents-00000.safetensors": 4}}, "expected \\[4, 2 C"),
        ({"shards": 3}, "cannot be read"),
        ({"sampling": "mode"}, "lacks a known sampling"),
    ):
        changed(**values)
        with pytest.raises(DataError, match=says):
            LatentSource(tmp_path / "l")
    changed()
    file = tmp_path / "l" / "latents-00000.safetensors"
    save_file({"moments": load_file(file)["moments"]}, file)
    with pytest.raises(DataError, match="is damaged"):
        LatentSource(tmp_path / "l")
    file.write_bytes(b"text")
    with pytest.raises(DataError, match="is damaged"):
        LatentSource(tmp_path / "l")
    (tmp_path / "l" / "latents.json").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        LatentSource(tmp_path / "l")

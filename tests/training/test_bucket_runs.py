"""Runs on images of several shapes: cached in aspect-ratio buckets, a batch of one shape each."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fdistill import distill, load_student
from fdistill.adapters.unet2d_condition import UNet2DConditionDenoiser
from fdistill.base.errors import ArgumentError, ConfigError, DataError
from fdistill.base.images import to_unit
from fdistill.base.rng import indexed_normal
from fdistill.commands.cli import app
from fdistill.condition import TextCondition
from fdistill.config.reading import load_config
from fdistill.data.latents import LatentSource
from fdistill.data.order import Batching
from fdistill.data.recipes import RECIPES, pixels
from fdistill.data.sample_loader import PromptsInShapes, SampleLoader, ScaledLatents
from fdistill.denoiser import LatentScaling
from fdistill.generation.generate import generate
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.training.cache import cache
from support.text_families import RESOLUTION, flux_dev, sdxl
from support.text_runs import LORA, PROMPTS, SETTINGS

WIDE, SQUARE, TALL = (12, 20), (16, 16), (20, 12)  # height and width of the buckets of 16 pixels in steps of 4
SIZES = [WIDE, SQUARE, TALL, WIDE, SQUARE, WIDE, (24, 40), (30, 31)]
RUN: dict[str, Any] = {**SETTINGS, "batch_size": 2, "discriminator.head": "pooled", "iterations": 6}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i % len(PROMPTS)], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl(tmp_path_factory.mktemp("teacher") / "sdxl")


@pytest.fixture(scope="module")
def latents(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "latents"
    return cache(photos, teacher=teacher, output=folder, workers=1, sampling="mean", buckets=4, batch_size=2)


def run(output: Path, teacher: Path, latents: Path, **changes: Any) -> Path:
    return distill("digits", output=output, **{**RUN, "teacher": str(teacher), "data": str(latents), **changes})


def test_latents_are_those_of_the_images_in_their_shapes(photos: Path, teacher: Path, latents: Path) -> None:
    source, latent_space = LatentSource(latents), open_teacher(TeacherSettings(str(teacher))).latents
    assert latent_space is not None
    assert source.buckets is not None
    assert source.shape is None
    assert [tuple(each) for each in source.buckets] == [
        (*WIDE, 4, (4, 6, 10)),
        (*SQUARE, 3, (4, 8, 8)),
        (*TALL, 1, (4, 10, 6)),
    ]
    order = [0, 3, 5, 6, 1, 4, 7, 2]  # images in the order of their buckets; within one, that of its batches
    assert source.text is not None
    row, found = 0, []
    for bucket in source.buckets:
        rows = torch.arange(row, row + bucket.images)
        row += bucket.images
        mean, said = source.latent(rows, draw=0), source.text.prompts(rows)
        for own in order[rows[0] : rows[0] + bucket.images]:
            image = Image.open(photos / f"{own}.png")
            part = RECIPES["center-box"](image, bucket.height, bucket.width)
            wanted = latent_space.moments(to_unit(torch.from_numpy(pixels(part).copy()))[None])[0, :4]
            distances = [float((each - wanted).abs().max()) for each in mean]
            place = int(np.argmin(distances))
            assert distances[place] < 1e-2  # float16
            assert said[place] == PROMPTS[own % len(PROMPTS)]
            found.append(own)
    assert sorted(found) == list(range(len(SIZES)))


@pytest.mark.thorough  # the resumed run has batches of several shapes as well
def test_every_batch_is_of_one_shape_and_the_network_is_told_which(
    teacher: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[tuple[int, ...], tuple[float, ...]]] = set()
    call = UNet2DConditionDenoiser._call

    def recorded(self: UNet2DConditionDenoiser, network_input: Any, timestep: Any, condition: Any) -> Any:
        for row in condition["time_ids"].tolist():  # of the prompt and of what guidance leads away from
            seen.add((tuple(network_input.shape[2:]), tuple(row)))
        return call(self, network_input, timestep, condition)

    monkeypatch.setattr(UNet2DConditionDenoiser, "_call", recorded)
    student = run(tmp_path / "run", teacher, latents, iterations=12, seed=2, **{"log.samples_every": 12})
    assert seen == {
        ((height // 2, width // 2), (height, width, 0, 0, height, width)) for height, width in (WIDE, SQUARE, TALL)
    }
    assert load_student(student).sample_shape == (4, 8, 8)  # the teacher's own size again
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for record in records for value in record.values() if isinstance(value, float))


def test_two_processes_read_the_halves_of_the_same_batches(latents: Path) -> None:
    source = ScaledLatents(LatentSource(latents), LatentScaling((0.5,) * 4, (0.0,) * 4))
    whole, *halves = (
        SampleLoader(source, Batching(2, 3, 5, rank, processes)) for rank, processes in ((0, 1), (0, 2), (1, 2))
    )
    for batch, first, second in itertools.islice(zip(whole, *halves, strict=False), 20):
        assert batch.pixels == first.pixels == second.pixels
        assert torch.equal(batch.rows, torch.cat([first.rows, second.rows]))
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert batch.pixels == tuple(2 * side for side in batch.images.shape[2:])


@pytest.mark.thorough  # by day, of images of one shape
def test_a_resumed_run_equals_an_uninterrupted_one(teacher: Path, latents: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", teacher, latents)
    distill_part = {**RUN, "teacher": str(teacher), "data": str(latents), "log.checkpoint_every": 3}
    distill("digits", output=tmp_path / "part", **{**distill_part, "iterations": 3})
    resumed = distill("digits", output=tmp_path / "part", resume=True, **distill_part)
    (one,), (other,) = (sorted(each.glob("unet/*.safetensors")) for each in (whole, resumed))
    first, second = load_file(one), load_file(other)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.thorough
def test_adapters_of_a_transformer_in_several_steps(photos: Path, tmp_path: Path) -> None:
    teacher = flux_dev(tmp_path / "flux")
    size = {"resolution": RESOLUTION}
    latents = cache(photos, teacher=teacher, output=tmp_path / "latents", workers=1, buckets=4, bucket_images=3, **size)
    buckets = LatentSource(latents).buckets
    assert buckets is not None
    assert [(each.height, each.width, each.images) for each in buckets] == [(*WIDE, 4), (*SQUARE, 4)]
    changes = {
        **LORA,
        **size,
        "student.steps": 2,
        "student.sampler": "deterministic",
        "guidance_scale": 3.5,
        "condition_dropout": 0.0,
        "segment.weight": 0.5,
        "discriminator.features": ["block1"],
    }
    student = run(tmp_path / "run", teacher, latents, **changes)
    assert len(load_student(student).levels) == 2


def test_images_that_are_not_square_are_drawn(teacher: Path, latents: Path, tmp_path: Path) -> None:
    """By the student and by its guided teacher, as the pipeline draws them at this size."""
    student = run(tmp_path / "run", teacher, latents, iterations=2, student_level=[999])
    asked: dict[str, Any] = {"num_images": 1, "prompts": ["a cat"], "seed": 5, "device": "cpu"}
    drawn = generate(tmp_path / "run", output=tmp_path / "wide", size=(16, 24), **asked)
    image = np.asarray(Image.open(drawn / "000000.png"), dtype=float)
    assert image.shape == (16, 24, 3)
    assert json.loads((drawn / "manifest.json").read_text())["size"] == [16, 24]
    pipeline = DiffusionPipeline.from_pretrained(student)
    noise = indexed_normal(5, [0], (4, 8, 12))
    sides = {"height": 16, "width": 24}  # SDXL's pipeline takes multiples of 8
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np"}
    (own,) = pipeline("a cat", latents=noise, **call, **sides).images
    assert np.abs(image - 255 * own).max() < 1.5
    (square,) = generate(tmp_path / "run", output=tmp_path / "square", **asked).glob("*.png")
    assert Image.open(square).size == (16, 16)
    guided = {"num_steps": 2, "guidance_scale": 2.0}
    (other,) = generate(teacher, output=tmp_path / "teacher", size=TALL, **asked, **guided).glob("*.png")
    assert Image.open(other).size == TALL[::-1]
    for wrong, message in (((11, 20), "got 20x11; expected multiples of 2"), ((0, 16), "got 16x0")):
        with pytest.raises(ArgumentError, match=message):
            generate(teacher, output=tmp_path / "wrong", size=wrong, **asked)
    with pytest.raises(ArgumentError, match="resolution: got 16 beside size"):
        generate(teacher, output=tmp_path / "wrong", size=WIDE, resolution=16, **asked)
    with pytest.raises(ArgumentError, match="makes images of one size; leave it out"):
        generate("digits", output=tmp_path / "wrong", size=WIDE, num_images=1, device="cpu")
    with pytest.raises(ArgumentError, match="a diffusers pipeline draws at its own size"):
        generate(teacher, output=tmp_path / "wrong", size=WIDE, sampler="pipeline", **asked)
    command = ["generate", str(teacher), "--num-images", "1", "--prompt", "a", "--steps", "1", "--size", "16"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "wrong")])
    assert "size: got '16', expected width x height in pixels, as in 1344x768" in str(result.exception)
    command[-1] = "20x12"
    assert CliRunner().invoke(app, [*command, "--output", str(tmp_path / "command")]).exit_code == 0
    assert Image.open(tmp_path / "command" / "000000.png").size == (20, 12)


def test_what_cannot_be_done_in_several_shapes_is_refused(
    photos: Path, teacher: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in (
        ({"discriminator.head": "convolutional"}, "expected discriminator.head=pooled, or squares alone"),
        ({"reuse_samples": True, "critic_steps": 2}, "expected reuse_samples=false"),
        ({"stages": [{"iterations": 5}, {"iterations": 1, "reuse_samples": True}]}, "expected reuse_samples=false"),
        ({"method": "dmd", "discriminator.head": "convolutional"}, r"expected regression.weight=0 with another method"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "refused", teacher, latents, **wrong)
    capsys.readouterr()
    run(tmp_path / "small", teacher, latents, iterations=1)
    assert "only 1 of 12x20 pixels for a batch of 2" in capsys.readouterr().err
    for buckets, message in ((3, "a multiple of 2, the autoencoder's factor"), (6, "divides the resolution, 16")):
        with pytest.raises(ArgumentError, match=message):
            cache(photos, teacher=teacher, output=tmp_path / "wrong", workers=1, buckets=buckets)
    with pytest.raises(ArgumentError, match="bucket_images: got 2, but without buckets nothing reads it"):
        cache(photos, teacher=teacher, output=tmp_path / "wrong", workers=1, bucket_images=2)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.thorough  # by day, batches of images are of one shape each
def test_prompts_alone_are_drawn_in_every_shape(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt in each shape, and each shape as often."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    seen: Counter[tuple[int, int]] = Counter()
    call = UNet2DConditionDenoiser._call

    def recorded(self: UNet2DConditionDenoiser, network_input: Any, timestep: Any, condition: Any) -> Any:
        height, width, *_ = condition["time_ids"][0].int().tolist()
        assert network_input.shape[2:] == (height // 2, width // 2)
        seen[height, width] += 1
        return call(self, network_input, timestep, condition)

    monkeypatch.setattr(UNet2DConditionDenoiser, "_call", recorded)
    free: dict[str, Any] = {"data": None, "prompts": str(tmp_path / "prompts.txt"), "method": "diff-instruct"}
    free |= {"discriminator.head": "convolutional", "condition_dropout": 0.0}
    distill(
        "digits", output=tmp_path / "run", **{**RUN, "teacher": str(teacher), **free, "buckets": 4, "iterations": 9}
    )
    assert seen.keys() == {WIDE, SQUARE, TALL}

    class Encoded:
        def __init__(self) -> None:
            self.prompts = PROMPTS
            self.null = TextCondition({"prompt_embeds": torch.zeros(4, 1, 1), "time_ids": torch.zeros(4, 6)})

        def __len__(self) -> int:
            return 4

        def rows(self, index: torch.Tensor) -> TextCondition:
            return self.null.rows(index)

    source = PromptsInShapes(Encoded(), {WIDE: (4, 6, 10), SQUARE: (4, 8, 8)})
    loader = SampleLoader(source, Batching(2, 0))
    shown: Counter[tuple[Any, int]] = Counter()
    for batch in itertools.islice(loader, 400):
        shown.update((batch.pixels, int(row) % 4) for row in batch.rows)
        assert batch.images.shape == (2, 4, *(side // 2 for side in batch.pixels or ()))
    assert len(shown) == 8
    assert min(shown.values()) > 80
    for wrong, message in (({"data": "digits"}, "but data=digits, and shapes"), ({"prompts": None}, "prompts is null")):
        with pytest.raises(ConfigError, match=message):
            load_config("digits", {**free, "buckets": 4, **wrong})
    with pytest.raises(ConfigError, match="a multiple of 2, the autoencoder's factor"):
        distill("digits", output=tmp_path / "wrong", **{**RUN, "teacher": str(teacher), **free, "buckets": 3})


def test_a_damaged_list_of_buckets_is_named(latents: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(latents, tmp_path / "copy"))
    meta = json.loads((copy / "latents.json").read_text())
    for buckets in ([[12, 20, 3], [16, 16, 4], [20, 12, 1]], [[12, 20, 4]], "all", [[12, 20]]):
        (copy / "latents.json").write_text(json.dumps({**meta, "buckets": buckets}))
        with pytest.raises(DataError, match="make them again with fdistill cache"):
            LatentSource(copy)


def test_the_command(photos: Path, teacher: Path, tmp_path: Path) -> None:
    made = tmp_path / "latents"
    arguments = ["cache", str(photos), "--teacher", str(teacher), "--workers", "1", "--output", str(made)]
    result = CliRunner().invoke(app, [*arguments, "--buckets", "4", "--bucket-images", "2"])
    assert result.exit_code == 0, result.output
    assert "buckets: 2 (width x height: images), 20x12: 4, 16x16: 4" in result.stderr
    source = LatentSource(made)
    assert source.buckets is not None
    assert len(source.buckets) == 2

"""Images to score as people have them: what is left out is refused, prompts find their images, a zip is its folder."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from evaluation.evaluate import evaluate, holds_images
from evaluation.images import open_images
from evaluation.metrics.inception_score import in_runs, inception_score_metric
from evaluation.metrics.metric import Measured
from evaluation.pairing import prompts_of
from fdistill.assets import CLIP_DIGITS
from fdistill.base.errors import ArgumentError, DataError
from fdistill.commands.cli import app
from fdistill.data.digit_captions import evaluation_prompts, load_captioned_digits
from fdistill.data.digits import load_digits
from fdistill.data.prompts import PromptList
from support.files import patched, png, put, zipped

COUNT = 30
SMALL = pytest.mark.filterwarnings("ignore:.*names show the count")
BY_LETTERS = sorted(range(COUNT), key=str)


def save(folder: Path, images: torch.Tensor, names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        array = image.permute(1, 2, 0).numpy()
        name = f"{number}.png" if names is None else names[number]
        Image.fromarray(array[..., 0] if len(image) == 1 else array).save(folder / name)
    return folder


def lines(prompts: list[str], **more: Any) -> str:
    return "".join(json.dumps({"text": text, "file_name": f"{n}.png"} | more) + "\n" for n, text in enumerate(prompts))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(0.png ... 29.png, their prompts)"""
    images, prompts = load_captioned_digits()
    return save(tmp_path_factory.mktemp("digits") / "images", images[:COUNT]), [p.text for p in prompts[:COUNT]]


def cosine(images: Path, prompts: Path | None = None) -> float:
    how: dict[str, Any] = {"protocol": "folder", "metrics": ["clip_own"], "weights": {"clip": CLIP_DIGITS}}
    ((value),) = evaluate(images, prompts=prompts, device="cpu", **how)["metrics"].values()
    return float(value)


def test_prompts_go_with_their_images_in_every_form(captioned: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, prompts = captioned
    there = save(tmp_path / "there", load_captioned_digits()[0][:COUNT])
    put(there / "metadata.jsonl", lines(prompts))
    right = cosine(there)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosine(folder, put(tmp_path / "a.jsonl", lines(prompts))) == right
        shuffled = "".join(reversed(lines(prompts).splitlines(keepends=True)))
        assert cosine(folder, put(tmp_path / "b.jsonl", shuffled)) == right
    with pytest.warns(UserWarning, match=r"prompt 3 goes with 2\.png, where by the order of letters .* with 10\.png"):
        assert cosine(folder, put(tmp_path / "c.txt", "\n".join(prompts))) == right
    by_letters = [prompts[number] for number in BY_LETTERS]
    with pytest.warns(UserWarning, match="order of letters"):
        assert cosine(folder, put(tmp_path / "d.txt", "\n".join(by_letters))) < right - 0.2
    as_written = lines(by_letters)  # the names in the lines count, not their order
    assert cosine(folder, put(tmp_path / "e.jsonl", as_written)) < right - 0.2


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([f"{number}.png" for number in range(1, COUNT + 1)], r"no line has file_name '0\.png', and 1 of 30 images"),
        (["0.png"] * COUNT, r"prompts: 0\.png has two"),
        ([f"sub/{number}.png" for number in range(COUNT)], "and 30 of 30 images of"),
    ],
)
def test_names_that_do_not_fit_the_images(files: list[str], says: str, captioned: tuple[Path, list[str]]) -> None:
    with pytest.raises(ArgumentError, match=says):
        prompts_of(open_images(captioned[0], channels=3), PromptList(captioned[1], files))


def test_names_of_images_that_have_none_do_not_count() -> None:
    images = open_images("digits", channels=1, max_images=3)
    assert prompts_of(images, PromptList(["a", "b", "c"], ["x.png", "y.png", "z.png"])) == ["a", "b", "c"]


def test_a_blank_line_is_refused_and_moves_nothing(captioned: tuple[Path, list[str]], tmp_path: Path) -> None:
    gap = captioned[1].copy()
    gap.insert(4, "")
    path = put(tmp_path / "gap.txt", "\n".join(gap))
    with pytest.raises(DataError, match=r"gap\.txt: line 5 is blank"):
        evaluate(captioned[0], protocol="folder", prompts=path)
    said = CliRunner().invoke(
        app, ["generate", "digits-t2i", "--num-images", "2", "--prompts", str(path), "--output", str(tmp_path / "out")]
    )
    assert isinstance(said.exception, DataError)
    assert not (tmp_path / "out").exists()


def mixed(tmp: Path) -> dict[str, Path]:
    """{case: a folder of which a part is not read}"""
    images, labels = load_digits()
    others = save(tmp / "others", images[:50])
    half = save(tmp / "half", images[:100])
    for number in range(0, 100, 2):
        Image.open(half / f"{number}.png").save(half / f"{number}.tif")
        (half / f"{number}.png").unlink()
    beside = save(tmp / "beside", images[:100])
    (beside / "more").symlink_to(others)
    for place, (image, label) in enumerate(zip(images[:100], labels[:100].tolist(), strict=True)):
        save(tmp / "inside" / str(label) / str(place), image[None])
    (tmp / "inside" / "3" / "more").symlink_to(others)
    gone = save(tmp / "gone", images[:100])
    for name in ("98.png", "99.png"):
        (gone / name).unlink()
        (gone / name).symlink_to("nowhere.png")
    return {"half": half, "beside": beside, "inside": tmp / "inside", "gone": gone}


SAYS = {
    "half": r"50 images; left out: 50 images of formats that are not read \(\.tif\)",
    "beside": r"100 images; left out: 1 linked folder \(more\)",
    "inside": r"100 images in 10 classes \(0 -> 0 \.\.\. 9 -> 9\); left out: 1 linked folder \(3/more\)",
    "gone": r"98 images; left out: 2 links that lead nowhere, pipes or devices \(98\.png, 99\.png\)",
}


@SMALL
@pytest.mark.parametrize("case", SAYS)
def test_images_that_would_be_missing_in_a_score_are_refused_by_name(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, refused = mixed(tmp_path)[case], rf"{SAYS[case]}; .* more than 1 % .* pass --allow-skipped"
    how: dict[str, Any] = {"metrics": ["fd_digits"], "device": "cpu", "replicates": 0}
    with pytest.raises(DataError, match=f"images .*{refused}"):
        evaluate(folder, **how)
    with pytest.raises(DataError, match=f"images .*{refused}"):
        evaluate("digits", num_images=80, num_steps=1, reference=folder, **how)
    packed = ["reference", str(folder), "--protocol", "digits", "--output", str(tmp_path / "x.npz")]
    done = CliRunner().invoke(app, packed)
    assert re.search(refused, str(done.exception))
    capsys.readouterr()
    if case == "half":
        return  # too few are left for this score
    result = evaluate(folder, allow_skipped=True, **how)
    read = result["provenance"]["read"]
    assert re.search(SAYS[case], read["summary"])
    assert f"samples {folder}: {read['summary']}\n" in capsys.readouterr().err
    done = CliRunner().invoke(app, [*packed, "--allow-skipped"])
    assert done.exit_code == 0, done.output
    against = evaluate(folder, allow_skipped=True, reference=tmp_path / "x.npz", **how)
    assert against["provenance"]["reference"]["read"]["summary"] == read["summary"]


@SMALL
def test_a_file_in_a_hundred_may_be_missing(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", load_digits()[0][:100])
    put(folder / "x.gif")
    put(folder / "Thumbs.db")
    for number in range(50):
        put(folder / f"{number}.md")
    result = evaluate(folder, metrics=["fd_digits"], device="cpu", replicates=0)
    assert "1 image of a format that is not read (.gif)" in result["provenance"]["read"]["summary"]
    assert result["provenance"]["reference"]["read"]["summary"] == "1,797 images in 10 classes"


def test_a_folder_of_other_formats_is_told_so(tmp_path: Path) -> None:
    put(tmp_path / "set" / "1.tif", png())
    assert holds_images(tmp_path / "set")
    with pytest.raises(DataError, match="no images in this folder, but 1 image of a format that is not read"):
        evaluate(tmp_path / "set", protocol="folder", reference=tmp_path / "set")
    put(tmp_path / "teacher" / "config.json", "{}")
    put(tmp_path / "teacher" / "logo.svg")
    assert not holds_images(tmp_path / "teacher")
    put(tmp_path / "notes" / ".ipynb_checkpoints" / "1.png", png())
    with pytest.raises(ArgumentError, match="holds neither images nor a network"):
        holds_images(tmp_path / "notes")


@pytest.mark.parametrize("under", ["", "images/"])
def test_a_zip_of_generated_images_is_their_folder(under: str, tmp_path: Path) -> None:
    pictures, prompts = load_captioned_digits()
    folder = save(tmp_path / "images", pictures[:COUNT])
    labels = [number % 7 for number in range(COUNT)]
    manifest = {"labels": labels, "prompts": [prompt.text for prompt in prompts[:COUNT]], "seed": 3, "device": "cpu"}
    put(folder / "manifest.json", json.dumps(manifest))
    put(folder / ".ipynb_checkpoints" / "1-checkpoint.png", png())
    packed = open_images(zipped(folder, tmp_path / "images.zip", under=under), channels=3)
    plain = open_images(folder, channels=3)
    assert torch.equal(
        packed.read(range(COUNT)), pictures[:COUNT]
    )  # in the order of the numbers, as the manifest's lists
    assert packed.sha256() == plain.sha256()
    assert packed.labels is not None
    assert packed.labels.tolist() == labels
    assert packed.prompts == plain.prompts == manifest["prompts"]
    assert packed.facts == plain.facts
    assert packed.facts["seed"] == 3
    put(folder / "manifest.json", "[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read as JSON \(nested too deeply\)"):
        open_images(folder, channels=3)


def test_damage_in_a_zip_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", load_digits()[0][:9])
    path = patched(zipped(folder, tmp_path / "a.zip"), "7.png", local=60, value=b"\xff\xff")
    images = open_images(path, channels=1)
    with pytest.raises(DataError, match=r"a\.zip: 7\.png cannot be read \(Bad CRC-32.*\); copy or download it again$"):
        images.read(range(9))
    os.mkfifo(folder / "x.png")
    with pytest.raises(DataError, match="1 link that leads nowhere, pipe or device"):
        open_images(folder, channels=1)


def test_photos_that_are_turned_are_told(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(80):
        turned = {"exif": exif} if number % 2 else {}
        put(tmp_path / f"{number:02d}.png", png(number, (8, 8), **turned))
    for see in (lambda images: images.sha256(), lambda images: images.read(range(80))):
        images = open_images(tmp_path, channels=3)
        see(images)
        assert images.facts["turned_by_camera"] == 40
    assert images.read([1])[0, 0, 0, 0] == 1
    with pytest.warns(UserWarning, match=r"40 of 80 images are marked by a camera as turned \(EXIF\)"):
        evaluate(tmp_path, protocol="folder", reference=tmp_path, metrics=["clip_own"], **_clip(tmp_path))


def _clip(folder: Path) -> dict[str, Any]:
    prompts = put(folder.parent / "prompts.txt", "a seven\n" * 80)
    return {"weights": {"clip": CLIP_DIGITS}, "prompts": prompts, "device": "cpu"}


@pytest.mark.parametrize(
    ("labels", "runs"),
    [
        (torch.arange(1000) // 100, True),
        (torch.arange(1000) // 100 % 5, True),
        (torch.arange(1000) % 10, False),
        (torch.randint(10, (1000,), generator=torch.Generator().manual_seed(0)), False),
        (torch.zeros(1000, dtype=torch.long), False),
        (torch.zeros(1, dtype=torch.long), False),
    ],
)
def test_labels_that_lie_together(labels: torch.Tensor, runs: bool) -> None:
    assert in_runs(labels) == runs


def test_inception_score_in_order_warns_of_images_class_by_class() -> None:
    logits = torch.nn.functional.one_hot(torch.arange(1000) // 100, 10).float() * 9

    def score(metric: Any, order: torch.Tensor) -> float:
        class Labelled:
            name, labels = "images", (torch.arange(1000) // 100)[order]

        measured = Measured({"x.logits": logits[order]}, {}, {}, Labelled, None, torch.device("cpu"), {})  # type: ignore[arg-type]
        return float(metric.compute(measured)["inception_score"].value)

    in_order, shuffled = (inception_score_metric("x.logits", shuffled=value) for value in (False, True))
    mixed_up = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="images lie class by class"):
        assert score(in_order, torch.arange(1000)) == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(in_order, mixed_up) > 9
        assert score(shuffled, torch.arange(1000)) > 9  # as the warning advises


def test_prompts_of_a_protocol_go_with_images_in_the_order_of_numbers(tmp_path: Path) -> None:
    """More than a million generated images have names of 6 and of 7 digits."""
    for number in (999_998, 999_999, 1_000_000, 1_000_001):
        put(tmp_path / f"{number:06d}.png", png(number % 256))
    images = open_images(tmp_path, channels=3)
    assert images.read(range(4))[:, 0, 0, 0].tolist() == [n % 256 for n in range(999_998, 1_000_002)]
    assert len(evaluation_prompts()) > 4

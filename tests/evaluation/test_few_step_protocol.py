"""few-step-t2i from end to end: a teacher's and a student's images of the same prompts and noise, by all its metrics.

The networks are tiny and random; Inception is replaced by a few means, for which few images are enough.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation import extractors
from evaluation.compare import compare
from evaluation.evaluate import evaluate
from evaluation.extractors import Extractor
from fdistill import distill, generate
from fdistill.assets import CLIP_DIGITS
from fdistill.base.errors import CheckpointError
from support.dinov2 import published_dinov2
from support.image_reward import tiny_image_reward
from support.lpips import write_lpips
from support.preference import tiny_hps, tiny_pickscore

PROMPTS = ["a bold seven", "a thin three", "a bold one"]
COUNT = 12
OF_PROMPTS = {"hpsv2.1", "pickscore", "imagereward", "clip_x100"}
AGAINST_TEACHER = {"fid_t", "patch_fid_t"}
DIVERSITY = {"diversity_dinov2", "lpips_diversity"}


def quick(weights: dict[str, Path], **options: Any) -> dict[str, Any]:
    return {"protocol": "few-step-t2i", "weights": weights, "device": "cpu", "replicates": 4, **options}


def plain(names: Iterable[str]) -> list[str]:
    return [name.split("@")[0] for name in names]


def left_out(said: pytest.WarningsRecorder) -> dict[str, str]:
    texts = [str(warning.message) for warning in said if str(warning.message).startswith("left out: ")]
    return {text.split()[2]: text for text in texts}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images of the embedded teacher and of a student that has hardly learnt, as `fdistill generate` writes them."""
    folder = tmp_path_factory.mktemp("few-step")
    settings: dict[str, Any] = {"iterations": 1, "batch_size": 4, "critic_steps": 1, "student.steps": 2}
    settings |= {"log.samples_every": 0, "log.checkpoint_every": 0, "log.tracker": "none"}
    student = distill("digits-t2i", output=folder / "run", **settings)
    common: dict[str, Any] = {"num_images": COUNT, "prompts": PROMPTS, "seed": 3, "device": "cpu"}
    teacher = generate("digits-t2i", output=folder / "teacher", num_steps=3, guidance_scale=2.0, **common)
    return teacher, generate(student, output=folder / "student", **common)


def means(images: Tensor) -> Tensor:
    """[B, 3]: the means of the upper and of the lower half, and the standard deviation."""
    x = images.double()
    upper, lower = x.chunk(2, dim=2)
    return torch.stack([upper.mean((1, 2, 3)), lower.mean((1, 2, 3)), x.std((1, 2, 3))], 1)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """All of them; elsewhere there are none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    of_means = Extractor("inception-clean", {"pool": 3}, lambda x: {"pool": means(x).float()}, "", "0" * 64, True)
    monkeypatch.setitem(extractors.EXTRACTORS, "inception-clean", lambda *_: of_means)
    torch.save(published_dinov2(), tmp_path / "dinov2.pth")
    lpips = write_lpips(tmp_path)
    return {
        "hps21": tiny_hps(tmp_path, monkeypatch)[0],
        "pickscore": tiny_pickscore(tmp_path, monkeypatch)[0],
        **tiny_image_reward(tmp_path, monkeypatch),
        "clip-l14": CLIP_DIGITS,
        "dinov2": tmp_path / "dinov2.pth",
        "vgg16": lpips,
        "lpips": lpips,
    }


def pixels(folder: Path) -> Tensor:
    images = [np.asarray(Image.open(folder / f"{number:06d}.png").convert("RGB")) for number in range(COUNT)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def frechet(a: Tensor, b: Tensor) -> float:
    """By the textbook."""
    first, second = (np.cov(each.numpy(), rowvar=False) for each in (a, b))
    shift = (a.mean(0) - b.mean(0)).square().sum().item()
    return float(shift + np.trace(first + second) - 2 * np.sqrt(np.linalg.eigvals(first @ second).real).sum())


def test_teacher_and_student_are_scored_alike(
    folders: tuple[Path, Path], weights: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    teacher, student = folders
    of_teacher = evaluate(teacher, output=tmp_path / "teacher.json", **quick(weights))
    assert left_out(recwarn).keys() == AGAINST_TEACHER
    assert "needs a reference (--reference): the teacher's images" in left_out(recwarn)["fid_t"]
    recwarn.clear()
    of_student = evaluate(student, reference=teacher, output=tmp_path / "student.json", **quick(weights))
    assert left_out(recwarn) == {}

    assert set(plain(of_teacher["metrics"])) == OF_PROMPTS | DIVERSITY
    assert set(plain(of_student["metrics"])) == OF_PROMPTS | AGAINST_TEACHER | DIVERSITY
    for result in (of_teacher, of_student):
        assert result["spread"].keys() == result["metrics"].keys()
        assert all(spread["value"] > 0 for spread in result["spread"].values())
        assert result["provenance"]["seeds"] == [3]
    prompts = {result["provenance"]["prompts_sha256"] for result in (of_teacher, of_student)}
    assert len(prompts) == 1
    assert of_student["metrics"][f"fid_t@{COUNT} vs teacher"] == pytest.approx(
        frechet(means(pixels(student)), means(pixels(teacher))), rel=1e-3
    )
    for name in ("hpsv2.1", "pickscore"):  # the pictures of the worst, the median and the best pair
        assert (tmp_path / f"student.{name}.png").is_file()
        assert not (tmp_path / f"teacher.{name}.png").is_file()

    compared = compare([tmp_path / "student.json", tmp_path / "teacher.json"], output=tmp_path / "comparison")
    assert set(compared.metrics) == OF_PROMPTS | AGAINST_TEACHER | DIVERSITY
    table = (tmp_path / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert {"student", "teacher"} <= {line.split("|")[1].strip() for line in table.splitlines() if "|" in line}


def test_without_some_weights_the_others_are_scored(
    folders: tuple[Path, Path], weights: dict[str, Path], recwarn: pytest.WarningsRecorder
) -> None:
    """A sentence says which are missing, and where they are; a metric that is asked for by name is refused."""
    teacher, student = folders
    some = {name: path for name, path in weights.items() if name not in ("imagereward", "dinov2")}
    result = evaluate(student, reference=teacher, **quick(some))
    assert set(plain(result["metrics"])) == (OF_PROMPTS | AGAINST_TEACHER | DIVERSITY) - {
        "imagereward",
        "diversity_dinov2",
    }
    said = left_out(recwarn)
    assert said.keys() == {"imagereward", "diversity_dinov2"}
    assert "weights ImageReward.pt are not here" in said["imagereward"]
    assert "fetch https://huggingface.co/THUDM/ImageReward/" in said["imagereward"]
    assert "--weights dinov2=PATH" in said["diversity_dinov2"]
    for network in ("dinov2", "imagereward"):
        assert network not in result["provenance"]["extractors"]
    with pytest.raises(CheckpointError, match=r"imagereward: its weights ImageReward\.pt are not here"):
        evaluate(student, **quick(some, metrics=["hpsv2.1", "imagereward"]))
    with pytest.raises(CheckpointError, match=r"hps21: its weights .* are not here"):
        evaluate(student, **quick({}))


def test_weights_that_are_another_networks_are_not_left_out(
    folders: tuple[Path, Path], weights: dict[str, Path]
) -> None:
    with pytest.raises(CheckpointError, match="is no DINOv2"):
        evaluate(folders[1], **quick({**weights, "dinov2": weights["pickscore"]}))


def test_one_image_of_each_prompt_has_no_diversity_and_few_images_no_distance(
    folders: tuple[Path, Path], weights: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for source, name in zip(folders, ("teacher", "student"), strict=True):
        (tmp_path / name).mkdir()
        for number in range(3):
            shutil.copy(source / f"{number:06d}.png", tmp_path / name)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"prompts": PROMPTS}), encoding="utf-8")
    result = evaluate(tmp_path / "student", reference=tmp_path / "teacher", **quick(weights))
    assert set(plain(result["metrics"])) == OF_PROMPTS
    said = left_out(recwarn)
    assert said.keys() == AGAINST_TEACHER | DIVERSITY
    assert "fid_t of 3 samples is refused, as the covariance of 3 features is singular" in said["fid_t"]
    assert "needs several images of one class or prompt" in said["lpips_diversity"]
    assert not {"inception-clean", "dinov2", "lpips"} & result["provenance"]["extractors"].keys()
    with pytest.raises(ValueError, match="lpips_diversity needs several images"):
        evaluate(tmp_path / "student", **quick(weights, metrics=["hpsv2.1", "lpips_diversity"]))

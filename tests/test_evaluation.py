from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.digit_features import DigitFeatures, extract, load_digit_features
from evaluation.evaluate import evaluate
from evaluation.frechet import frechet_distance
from evaluation.precision_recall import precision_recall
from evaluation.samples import read_images
from fdistill import distill
from fdistill.assets import DIGITS_FEATURES
from fdistill.data.digits import load_digits
from fdistill.errors import ArgumentError, CheckpointError, OutputError
from fdistill.images import to_unit


def write(folder: Path, images: torch.Tensor, labels: torch.Tensor | None = None) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:06d}.png")
    if labels is not None:
        (folder / "manifest.json").write_text(json.dumps({"labels": labels.tolist(), "seed": 5}))
    return folder


def test_frechet_distance_of_known_gaussians() -> None:
    """Features whose sample mean and covariance are exactly what is asked for."""
    random = np.random.default_rng(0)
    white = random.normal(size=(500, 4))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    scale, shift = np.array([1.0, 2.0, 0.5, 3.0]), np.array([0.3, -0.2, 0.0, 1.0])
    distance = frechet_distance(torch.from_numpy(white), torch.from_numpy(white * scale + shift))
    assert math.isclose(distance, (shift**2).sum() + ((scale - 1) ** 2).sum(), rel_tol=1e-9)
    assert abs(frechet_distance(torch.from_numpy(white), torch.from_numpy(white))) < 1e-8


def test_frechet_distance_against_a_symmetric_square_root() -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(300, 6)) @ random.normal(size=(6, 6)), random.normal(size=(200, 6)) + 0.5

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root(root(s1) @ s2 @ root(s1)))
    assert math.isclose(frechet_distance(torch.from_numpy(x), torch.from_numpy(y)), expected, rel_tol=1e-9)


def test_frechet_distance_refuses_singular_covariances() -> None:
    with pytest.raises(ArgumentError, match="singular"):
        frechet_distance(torch.randn(4, 4), torch.randn(9, 4))
    with pytest.raises(ArgumentError, match="expected"):
        frechet_distance(torch.randn(9, 4), torch.randn(9, 3))


def test_precision_and_recall_are_not_swapped() -> None:
    torch.manual_seed(0)
    real = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 30])
    one_mode = torch.randn(200, 2)
    precision, recall = precision_recall(one_mode, real)
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    with pytest.raises(ArgumentError, match="more than 3"):
        precision_recall(torch.randn(3, 2), real)


def test_the_embedded_network_reads_digits() -> None:
    images, labels = load_digits()
    features, classes = extract(load_digit_features(), images)
    assert features.shape == (1797, 64)
    assert features.dtype == torch.float64
    assert (classes == labels).double().mean() > 0.98
    config = json.loads((DIGITS_FEATURES / "config.json").read_text())
    assert config["parameters"] == sum(p.numel() for p in DigitFeatures().parameters())
    one_by_one, _ = extract(load_digit_features(), images[:50], batch_size=1)
    torch.testing.assert_close(one_by_one, features[:50], rtol=1e-4, atol=1e-4)
    assert to_unit(images).abs().max() == 1


def test_real_digits_score_as_they_should(tmp_path: Path) -> None:
    images, labels = load_digits()
    folder = write(tmp_path / "real", images, labels)
    result = evaluate(folder, reference="digits", output=tmp_path / "scores.json")
    scores = result["metrics"]
    assert abs(scores["fd_digits"]) < 1e-6
    assert (scores["precision"], scores["recall"]) == (1.0, 1.0)
    assert scores["class_accuracy"] > 0.98
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    for key in (
        "protocol",
        "extractor",
        "extractor_sha256",
        "reference",
        "reference_sha256",
        "resize",
        "dtype",
        "seed",
    ):
        assert result["provenance"][key] is not None, key
    assert result["provenance"]["num_samples"] == 1797
    assert result["provenance"]["seed"] == 5
    assert {"fdistill", "torch", "torch-fidelity", "numpy", "python"} <= result["provenance"]["versions"].keys()
    shuffled = torch.randperm(1797)
    again = evaluate(write(tmp_path / "shuffled", images[shuffled]), reference=folder)
    assert abs(again["metrics"]["fd_digits vs real"]) < 1e-6
    # Without labels no class accuracy; against another reference, the names say so.
    assert set(again["metrics"]) == {"fd_digits vs real", "precision vs real", "recall vs real"}


def test_another_sample_count_is_in_the_name(tmp_path: Path) -> None:
    images, labels = load_digits()
    scores = evaluate(write(tmp_path / "few", images[:500], labels[:500]))["metrics"]
    assert set(scores) == {"fd_digits@500", "precision@500", "recall@500", "class_accuracy@500"}


def test_worse_images_score_worse(tmp_path: Path) -> None:
    images, labels = load_digits()
    noisy = (images.float() + 60 * torch.randn(images.shape)).clamp(0, 255).to(torch.uint8)
    wrong = evaluate(write(tmp_path / "wrong", images, labels.roll(1)), metrics=["class_accuracy"])["metrics"]
    assert wrong["class_accuracy"] < 0.3
    assert evaluate(write(tmp_path / "noisy", noisy), metrics=["fd_digits"])["metrics"]["fd_digits"] > 5


def test_a_checkpoint_is_sampled_as_the_protocol_wants(tiny_teacher: Path) -> None:
    result = evaluate(tiny_teacher, metrics=["class_accuracy"], num_steps=2)
    assert result["provenance"]["num_samples"] == 1797
    assert result["provenance"]["evaluations_per_image"] == 3
    assert result["provenance"]["kind"] == "teacher"
    assert result["metrics"]["class_accuracy"] < 0.5


def test_a_run_folder_is_sampled_though_it_holds_pictures(tiny_teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill("digits", output=run, teacher=str(tiny_teacher), batch_size=8, iterations=1)
    assert list(run.glob("*.png"))
    result = evaluate(run, metrics=["class_accuracy"])
    assert result["provenance"]["kind"] == "student"
    assert result["provenance"]["evaluations_per_image"] == 1
    assert result["provenance"]["checkpoint_sha256"]
    assert evaluate(run / "student", metrics=["class_accuracy"])["metrics"] == result["metrics"]


@pytest.mark.parametrize("manifest", ["[]", "no", '{"labels": 3}', '{"labels": ["1"]}', '{"labels": [1.5]}'])
def test_manifests_that_make_no_sense_are_refused(manifest: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "images", load_digits()[0][:1])
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ArgumentError, match=r"manifest\.json"):
        evaluate(folder)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    images, _ = load_digits()
    folder = write(tmp_path / "images", images[:100])
    with pytest.raises(ArgumentError, match="did you mean 'fd_digits'"):
        evaluate(folder, metrics=["fd_digit"])
    with pytest.raises(ArgumentError, match="protocol: got 'digit'"):
        evaluate(folder, protocol="digit")
    with pytest.raises(ArgumentError, match="seed"):
        evaluate("digits", seed=-1)
    with pytest.raises(ArgumentError, match="needs labels"):
        evaluate(folder, metrics=["class_accuracy"])
    with pytest.raises(ArgumentError, match="no such folder"):
        evaluate(folder, reference="mnist")
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"no \.png"):
        evaluate(folder, reference=tmp_path / "empty")
    with pytest.raises(OutputError, match="cannot write"):
        evaluate(folder, metrics=["fd_digits"], output=folder / "000000.png" / "scores.json")


def test_images_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    images, _ = load_digits()
    mixed = write(tmp_path / "mixed", images[:3])
    Image.new("L", (9, 8)).save(mixed / "000003.png")
    with pytest.raises(ArgumentError, match="expected one size"):
        read_images(mixed)
    large = tmp_path / "large"
    large.mkdir()
    Image.new("RGB", (16, 16)).save(large / "0.png")
    with pytest.raises(ArgumentError, match=r"\(3, 16, 16\).*expected \(1, 8, 8\)"):
        evaluate(large)
    broken = write(tmp_path / "broken", images[:2])
    (broken / "000001.png").write_bytes(b"not a png")
    with pytest.raises(ArgumentError, match="cannot be read as an image"):
        read_images(broken)
    alpha = tmp_path / "alpha"
    alpha.mkdir()
    Image.new("RGBA", (8, 8)).save(alpha / "0.png")
    with pytest.raises(ArgumentError, match="mode RGBA"):
        read_images(alpha)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.evaluate import evaluate
from evaluation.extractors.digit_features import DigitFeatures, extract, load_digit_features, weights_sha256
from fdistill import distill
from fdistill.assets import DIGITS_FEATURES
from fdistill.base.errors import ArgumentError, CheckpointError, DataError, OutputError
from fdistill.base.images import to_unit
from fdistill.data.digits import load_digits


def write(folder: Path, images: torch.Tensor, labels: torch.Tensor | None = None) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:06d}.png")
    if labels is not None:
        (folder / "manifest.json").write_text(json.dumps({"labels": labels.tolist(), "seed": 5}))
    return folder


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
    provenance = result["provenance"]
    for key in ("protocol", "extractors", "reference", "recipe", "dtype", "seeds", "batch_size", "samples_sha256"):
        assert provenance[key] is not None, key
    assert provenance["extractors"]["digits"]["sha256"] == weights_sha256()
    assert provenance["extractors"]["digits"]["preparation"]
    assert provenance["reference"]["name"] == "digits"
    assert len(provenance["reference"]["sha256"]) == 64
    assert result["provenance"]["num_samples"] == 1797
    assert result["provenance"]["seeds"] == [5]
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


@pytest.mark.thorough
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
    with pytest.raises(DataError, match=r"manifest\.json"):
        evaluate(folder)


@pytest.mark.filterwarnings("ignore:.*names show the count")
def test_fidelity_and_variety_are_not_mixed_up(tmp_path: Path) -> None:
    """Real zeros alone are faithful and lack variety: precision and density are high, recall and coverage low."""
    images, labels = load_digits()
    folder = write(tmp_path / "zeros", images[labels == 0])
    names = ["precision", "recall", "density", "coverage"]
    result = evaluate(folder, metrics=names)["metrics"]
    precision, recall, density, coverage = result.values()
    assert [name.split("@")[0] for name in result] == names
    assert min(precision, density) > 0.9
    assert max(recall, coverage) < 0.2


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    images, _ = load_digits()
    folder = write(tmp_path / "images", images[:100])
    with pytest.raises(ArgumentError, match="did you mean 'fd_digits'"):
        evaluate(folder, metrics=["fd_digit"])
    with pytest.raises(ArgumentError, match="protocol: got 'digit'"):
        evaluate(folder, protocol="digit")
    with pytest.raises(ArgumentError, match="seed"):
        evaluate("digits", seeds=[-1])
    with pytest.raises(ArgumentError, match="needs class labels"):
        evaluate(folder, metrics=["class_accuracy"])
    with pytest.raises(ArgumentError, match="each once"):
        evaluate("digits", seeds=[1, 1])
    with pytest.raises(DataError, match="no such file or folder"):
        evaluate(folder, reference="mnist")
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        evaluate(folder, reference=tmp_path / "empty")
    with pytest.raises(ArgumentError, match=r"fd_digits of 60 samples is refused.*at least 65"):
        evaluate(write(tmp_path / "few", images[:60]), metrics=["fd_digits"])
    with pytest.raises(ArgumentError, match="fid needs a reference"):
        evaluate(folder, protocol="folder", metrics=["fid"])
    with pytest.raises(ArgumentError, match="say how many"):
        evaluate("digits", protocol="folder")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a bold seven\n")
    with pytest.raises(ArgumentError, match="prompts: protocol 'digits-t2i' has its own, which digits-t2i draws"):
        evaluate("digits-t2i", protocol="digits-t2i", prompts=prompts)
    with pytest.raises(OutputError, match="cannot write"):
        evaluate(folder, metrics=["fd_digits"], output=folder / "000000.png" / "scores.json")


def test_scores_are_told_where_they_cannot_be_written(tmp_path: Path) -> None:
    """A disk may be full by the time that they have been measured."""
    images, labels = load_digits()
    folder = write(tmp_path / "images", images[:20], labels[:20])
    output = tmp_path / "full.json"
    output.symlink_to("/dev/full")
    with pytest.raises(
        OutputError, match=r"(?s)No space left on device.*; what was measured:\nclass_accuracy@20 +1\.0000"
    ):
        evaluate(folder, metrics=["class_accuracy"], output=output)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["full.json", "images"]


def test_scores_are_shown_before_they_are_written(tmp_path: Path) -> None:
    """Nobody may read the pipe that they are written to."""
    images, labels = load_digits()
    folder, output = write(tmp_path / "images", images[:20], labels[:20]), tmp_path / "s.json"
    seen: list[tuple[float, bool]] = []
    evaluate(
        folder,
        metrics=["class_accuracy"],
        output=output,
        shown=lambda result: seen.append((result["metrics"]["class_accuracy@20"], output.exists())),
    )
    assert seen == [(1.0, False)]
    assert output.exists()

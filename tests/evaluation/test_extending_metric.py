"""A new metric is one file, support/mean_shift.py, and a protocol that names it: nothing else has to know of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.compare import compare
from evaluation.comparison.table import text_table
from evaluation.evaluate import evaluate
from evaluation.extractors.digit_features import load_digit_features
from evaluation.make_reference import make_reference
from evaluation.protocols import PROTOCOLS, get_protocol
from fdistill.base.errors import ArgumentError
from fdistill.data.digits import load_digits
from support.mean_shift import mean_shift_metric

pytestmark = pytest.mark.filterwarnings("ignore:.*names show the count")

COUNT = 200


@pytest.fixture(autouse=True)
def protocol(monkeypatch: pytest.MonkeyPatch) -> str:
    digits = get_protocol("digits")
    shift = mean_shift_metric("mean_shift_digits", "digits.features")
    extended = replace(
        digits, name="digits-shift", metrics=(*digits.metrics, shift), default=("fd_digits", "mean_shift_digits")
    )
    monkeypatch.setitem(PROTOCOLS, extended.name, extended)
    return extended.name


def write(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:06d}.png")
    return folder


def mean_feature(images: torch.Tensor) -> np.ndarray:
    """By the digit network itself, in one batch, without anything of the evaluation."""
    with torch.no_grad():
        features, _ = load_digit_features()(images.float() / 127.5 - 1)
    mean: np.ndarray = features.double().numpy().mean(axis=0)
    return mean


def test_it_is_measured_named_and_ranked(protocol: str, tmp_path: Path) -> None:
    images, _ = load_digits()
    sets = {"real": images[:COUNT], "inverted": 255 - images[:COUNT]}
    name, files = f"mean_shift_digits@{COUNT}", []
    for kind, samples in sets.items():
        files.append(tmp_path / f"{kind}.json")
        result = evaluate(write(tmp_path / kind, samples), protocol=protocol, replicates=0, output=files[-1])
        expected = np.linalg.norm(mean_feature(samples) - mean_feature(images))
        assert result["metrics"][name] == pytest.approx(expected, rel=1e-4)
    scores = [json.loads(path.read_text())["metrics"][name] for path in files]
    assert scores[0] < 0.5 * scores[1]
    table = text_table(compare(files, metrics=["mean_shift_digits"]))
    assert "lower is better: mean_shift_digits" in table
    rows = {line.split()[0]: line for line in table.splitlines() if line.startswith(("real", "inverted"))}
    assert ("*" in rows["real"], "*" in rows["inverted"]) == (True, False)


def test_a_reference_file_serves_it(protocol: str, tmp_path: Path) -> None:
    images, _ = load_digits()
    samples = write(tmp_path / "samples", images[:COUNT])
    file = make_reference("digits", output=tmp_path / "own.npz", protocol=protocol, metrics=["mean_shift_digits"])
    how = {"protocol": protocol, "metrics": ["mean_shift_digits"]}
    found = [list(evaluate(samples, reference=reference, **how)["metrics"].values()) for reference in (None, file)]  # type: ignore[arg-type]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_its_name_is_suggested_where_it_is_misspelt(protocol: str, tmp_path: Path) -> None:
    samples = write(tmp_path / "samples", load_digits()[0][:COUNT])
    with pytest.raises(ArgumentError, match="did you mean 'mean_shift_digits'"):
        evaluate(samples, protocol=protocol, metrics=["mean_shift_digit"])


def test_it_imports_no_torch() -> None:
    """As metrics in `evaluation.metrics` must not: results in files are compared without torch."""
    folder = Path(__file__).parent.parent
    code = f"import sys; sys.path.append({str(folder)!r}); import support.mean_shift; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

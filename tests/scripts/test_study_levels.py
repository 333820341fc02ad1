"""Up to which level a teacher knows more than the mean of its data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from support.denoisers import GaussianDenoiser

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import study_levels as study


def test_the_variance_is_that_within_classes() -> None:
    x0, labels = torch.randn(30, 2, 3, 4) + torch.arange(30).view(-1, 1, 1, 1) % 3, torch.arange(30) % 3 * 7
    expected = torch.stack([x0[labels == label].var(0) for label in (0, 7, 14)]).mean()
    assert study.class_variance(x0, labels) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(SystemExit, match="a class has one"):
        study.class_variance(x0, torch.arange(30))


def test_the_error_of_the_exact_posterior_mean_is_its_variance() -> None:
    torch.manual_seed(0)
    mean, std, sigmas = 0.3, 0.5, (0.05, 0.5, 2.0, 50.0)
    teacher = GaussianDenoiser(mean, std, size=4)
    x0, labels = mean + std * torch.randn(20000, 1, 1, 4), torch.zeros(20000, dtype=torch.int64)
    found = study.shares(teacher, x0, labels, [torch.tensor(sigma) for sigma in sigmas])
    expected = [sigma**2 / (std**2 + sigma**2) for sigma in sigmas]
    assert found == pytest.approx(expected, rel=0.03)


def test_where_a_teacher_is_wrong_it_knows_less_than_the_mean_and_levels_end_before() -> None:
    torch.manual_seed(0)
    teacher = GaussianDenoiser(0.2, 0.5, size=4)  # the data's mean is 0: noise hides the image and not the error
    x0, labels = 0.5 * torch.randn(20000, 1, 1, 4), torch.zeros(20000, dtype=torch.int64)
    found = study.shares(teacher, x0, labels, [torch.tensor(sigma) for sigma in (0.1, 0.5, 80.0)])
    assert found[2] == pytest.approx(1 + 0.2**2 / 0.5**2, rel=0.03)
    assert found[0] < found[1] < 1


def test_the_cut_is_the_last_level_below_the_share() -> None:
    found = [0.0] * 12 + [0.98, 0.995] + [1.2] * 6
    assert study.cut(found, 0.99) == study.FRACTIONS[12] == 0.65
    assert study.cut([2.0] * 20, 0.99) is None


def test_the_script_prints_the_cut_of_the_digits_and_refuses_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study_levels.py", "digits", "--images", "128"])
    study.main()
    assert 0.5 <= float(capsys.readouterr().out.rpartition("matching_levels.high=")[2]) <= 0.8
    monkeypatch.setattr(sys, "argv", ["study_levels.py", "digits-t2i"])
    with pytest.raises(SystemExit, match="takes prompts"):
        study.main()

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdistill.adapters.checkpoint import load_teacher, resolve_checkpoint
from fdistill.base.errors import OutputError
from fdistill.base.files import cache_folder
from fdistill.data.teacher_samples import SampleSet, TeacherSamples, draw_samples, teacher_samples
from fdistill.sampler import heun_sample, sampling_levels


def wanted(folder: Path, start_level: float = 80.0) -> SampleSet:
    return SampleSet(resolve_checkpoint(folder).fingerprint(load_teacher(folder)), 10, 4, start_level)


def make(folder: Path, start_level: float = 80.0) -> TeacherSamples:
    teacher, device = load_teacher(folder), torch.device("cpu")

    def labels(rows: range) -> torch.Tensor:
        return torch.tensor(rows) % 10

    asked = wanted(folder, start_level)
    return teacher_samples(asked, 10, lambda: draw_samples(teacher, asked, labels, device=device, progress=False))


def test_pairs_are_the_noise_and_what_the_sampler_makes_of_it(tiny_teacher: Path) -> None:
    made, rows = make(tiny_teacher, start_level=2.5), torch.tensor([7, 2])
    assert made.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    again = heun_sample(load_teacher(tiny_teacher), made.noise(rows), made.labels[rows], 4, start_level=2.5)
    torch.testing.assert_close(again, made.x0[rows], rtol=1e-4, atol=1e-5)


def test_the_sampler_starts_where_it_is_told(tiny_teacher: Path) -> None:
    levels = sampling_levels(load_teacher(tiny_teacher), 5, start_level=2.5)
    assert levels[0] == 2.5
    assert levels[-1] == pytest.approx(0.002, rel=1e-5)
    assert (levels.diff() < 0).all()


def test_samples_are_made_once_for_each_setting(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    assert not wanted(tiny_teacher).is_cached
    first = make(tiny_teacher).x0.clone()  # as what is read is the file, mapped into memory
    assert wanted(tiny_teacher).is_cached
    assert not wanted(tiny_teacher, 2.5).is_cached
    other = make(tiny_teacher, start_level=2.5)
    assert not torch.equal(first, other.x0)
    files = sorted((tmp_path / "cache" / "teacher-samples").glob("*/*"))
    assert len(files) == 2
    monkeypatch.setattr("fdistill.data.teacher_samples.heun_sample", lambda *a, **k: pytest.fail("made again"))
    assert torch.equal(make(tiny_teacher).x0, first)
    monkeypatch.undo()
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    for path in files:  # cut short by a kill or a full disk: made anew
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(make(tiny_teacher).x0, first)


def test_a_cache_that_cannot_be_written_is_named(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write"):
        make(tiny_teacher)


def test_the_evaluations_that_are_announced_are_those_that_are_made(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(tiny_teacher)
    evaluations, evaluate = [], teacher.denoise_with_features

    def counted(x: Tensor, *arguments: Any) -> Any:
        evaluations.append(len(x))
        return evaluate(x, *arguments)

    monkeypatch.setattr(teacher, "denoise_with_features", counted)
    heun_sample(teacher, torch.randn(2, *teacher.sample_shape), torch.tensor([0, 1]), wanted(tiny_teacher).num_steps)
    assert len(evaluations) == wanted(tiny_teacher).evaluations == 7


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert cache_folder() == Path("somewhere/fdistill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fdistill"


def test_what_the_weights_mean_is_part_of_the_key(tiny_teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"sigma_data": 0.75', '"sigma_data": 0.3'))
    assert not torch.allclose(make(tiny_teacher).x0, make(other).x0)

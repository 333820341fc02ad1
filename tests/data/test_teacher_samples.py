from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fdistill.adapters.checkpoint import load_teacher, resolve_checkpoint
from fdistill.base.errors import OutputError
from fdistill.base.files import cache_folder
from fdistill.data.teacher_samples import TeacherSamples, teacher_samples
from fdistill.sampler import heun_sample, sampling_levels


def make(folder: Path, **changes: float) -> TeacherSamples:
    settings = {"count": 10, "num_steps": 4, "start_level": 80.0, **changes}
    teacher = load_teacher(folder)
    fingerprint = resolve_checkpoint(folder).fingerprint(teacher)

    def labels(rows: range) -> torch.Tensor:
        return torch.tensor(rows) % 10

    return teacher_samples(teacher, fingerprint, labels, device=torch.device("cpu"), progress=False, **settings)  # type: ignore[arg-type]


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
    first, other = make(tiny_teacher), make(tiny_teacher, start_level=2.5)
    assert not torch.equal(first.x0, other.x0)
    files = sorted((tmp_path / "cache" / "teacher-samples").iterdir())
    assert len(files) == 2
    monkeypatch.setattr("fdistill.data.teacher_samples.heun_sample", lambda *a, **k: pytest.fail("made again"))
    assert torch.equal(make(tiny_teacher).x0, first.x0)
    monkeypatch.undo()
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    for path in files:  # cut short by a kill or a full disk: made anew
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(make(tiny_teacher).x0, first.x0)


def test_a_cache_that_cannot_be_written_is_named(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write"):
        make(tiny_teacher)


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

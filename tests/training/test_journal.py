from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fdistill.base.errors import NonFiniteError
from fdistill.step import PerSample
from fdistill.training.journal import Journal, append_record, read_records, scalars, truncate_records


def journal() -> Journal:
    return Journal(lambda t: t.long(), 3)


def test_means_spread_and_accuracy_per_bin() -> None:
    own = journal()
    t = torch.tensor([0.0, 0.0, 2.0, 2.0])
    for correct in ([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        logs = {
            "generator/h": PerSample(torch.tensor([1.0, 2.0, 3.0, 6.0]), t),
            "discriminator/accuracy_real": PerSample(torch.tensor(correct), t),
            "discriminator/accuracy_fake": PerSample(torch.zeros(4), t),
        }
        own.add(logs, {"generator": torch.tensor(2.0)})
    record = own.record()
    assert (record["generator/h"], record["generator/h_min"], record["generator/h_max"]) == (3.0, 1.0, 6.0)
    assert record["generator/grad_norm"] == 2.0
    assert record["discriminator/accuracy"] == 7 / 16
    assert record["discriminator/accuracy_per_bin"] == [3 / 8, None, 4 / 8]
    assert own.record() == {}
    flat = scalars(record)
    assert flat["discriminator/accuracy_per_bin/2"] == 0.5
    assert "discriminator/accuracy_per_bin/1" not in flat


def test_a_nan_names_role_quantity_and_noise_level() -> None:
    own = journal()
    value = torch.tensor([1.0, math.nan, 1.0])
    own.add({"fake_score/denoising": PerSample(value, torch.tensor([0.1, 2.5, 1.0]))}, {})
    with pytest.raises(NonFiniteError, match=r"fake_score: denoising became nan at noise level t = 2\.5 \(1 of 3"):
        own.record()
    own = journal()
    own.add({}, {"generator": torch.tensor(math.inf)})
    with pytest.raises(NonFiniteError, match="generator: the gradient became inf"):
        own.record()


def test_the_first_role_to_break_is_named_not_those_it_broke() -> None:
    own, t = journal(), torch.ones(2)
    good, bad = torch.zeros(2), torch.full((2,), math.nan)
    own.add({"fake_score/denoising": PerSample(good, t)}, {"fake_score": torch.tensor(1.0)})
    own.add({"generator/matching": PerSample(bad, 4 * t)}, {"generator": torch.tensor(math.nan)})
    own.add({"fake_score/denoising": PerSample(bad, t)}, {"fake_score": torch.tensor(math.nan)})
    with pytest.raises(NonFiniteError, match="generator: matching became nan at noise level t = 4 "):
        own.record()


def test_records_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in (10, 20, 30):
        append_record(path, {"iteration": iteration})
    with path.open("a") as stream:
        stream.write('{"iteration": 4')  # killed while writing
    assert [record["iteration"] for record in read_records(path)] == [10, 20, 30]
    truncate_records(path, 20)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [10, 20]

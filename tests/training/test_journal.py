from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fdistill.base.errors import NonFiniteError
from fdistill.step import PerSample
from fdistill.training.journal import (
    LOG_RATIO_COUNTS,
    LOG_RATIO_EDGES,
    Journal,
    append_record,
    read_records,
    scalars,
    truncate_records,
)


def journal() -> Journal:
    return Journal(lambda t: t.long(), 3, max_skipped=3)


def test_means_spread_and_accuracy_per_bin() -> None:
    own = journal()
    t = torch.tensor([0.0, 0.0, 2.0, 2.0])
    for correct in ([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        logs = {
            "generator/h": PerSample(torch.tensor([1.0, 2.0, 3.0, 6.0]), t),
            "discriminator/accuracy_real": PerSample(torch.tensor(correct), t),
            "discriminator/accuracy_fake": PerSample(torch.zeros(4), t),
        }
        own.add([logs], {"generator": torch.tensor(2.0)})
    record = own.record()
    assert (record["generator/h"], record["generator/h_min"], record["generator/h_max"]) == (3.0, 1.0, 6.0)
    assert record["generator/grad_norm"] == 2.0
    assert record["discriminator/accuracy"] == 7 / 16
    assert record["discriminator/accuracy_per_bin"] == [3 / 8, None, 4 / 8]
    assert own.record() == {}
    flat = scalars(record)
    assert flat["discriminator/accuracy_per_bin/2"] == 0.5
    assert "discriminator/accuracy_per_bin/1" not in flat


def test_log_ratios_are_counted_by_bin_and_cell() -> None:
    """numpy's histogram says the same."""
    own, draws = journal(), torch.Generator().manual_seed(0)
    t, values = torch.randint(0, 3, (400,), generator=draws).float(), 3 * torch.randn(400, generator=draws)
    for half in (slice(0, 100), slice(100, 400)):
        own.add([{"generator/log_ratio": PerSample(values[half], t[half])}], {"generator": torch.tensor(1.0)})
    counts = own.record()[LOG_RATIO_COUNTS]
    edges = [-np.inf, *LOG_RATIO_EDGES, np.inf]
    assert counts == [np.histogram(values[t == number].numpy(), edges)[0].tolist() for number in range(3)]
    assert sum(map(sum, counts)) == 400


def test_skipped_updates_are_counted_and_left_out_of_the_means() -> None:
    own, t = journal(), torch.tensor([0.1, 2.5, 1.0])
    good, bad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    for value, norm in ((good, 2.0), (bad, math.nan), (bad, math.nan), (3 * good, 4.0), (bad, math.nan)):
        logs = {"fake_score/denoising": PerSample(value, t), "discriminator/gan_real": PerSample(good, t)}
        own.add([logs], {"fake_score": torch.tensor(norm), "discriminator": torch.tensor(1.0)}, place="iteration 7")
    record = own.record()
    assert (record["fake_score/denoising"], record["fake_score/grad_norm"]) == (2.0, 3.0)
    assert record["fake_score/skipped"] == 3
    assert "discriminator/skipped" not in record
    assert record["skipped"] == [
        "fake_score: denoising became nan at noise level t = 2.5 (1 of 3 samples) at iteration 7"
    ]
    assert own.stuck
    own.add([{}], {"fake_score": torch.tensor(1.0)})
    assert own.record() == {"fake_score/grad_norm": 1.0}
    assert not own.stuck


def test_too_many_in_a_row_end_the_run_and_the_first_is_named() -> None:
    """A row goes on from one record to the next; roles that another one broke are not named."""
    own, t = journal(), torch.ones(2)
    good, bad = torch.zeros(2), torch.full((2,), math.nan)
    for place in ("iteration 1", "iteration 2", "iteration 3"):
        own.add([{"fake_score/denoising": PerSample(good, t)}], {"fake_score": torch.tensor(1.0)}, place=place)
        student = [{"generator/matching": PerSample(bad, 4 * t)}, {"generator/matching": PerSample(good, t)}]
        own.add(student, {"generator": torch.tensor(math.inf)}, place=place)
        if place == "iteration 3":
            with pytest.raises(NonFiniteError) as caught:
                own.record()
        else:
            assert own.record()["generator/skipped"] == 1
    assert str(caught.value) == (
        "generator: matching became nan at noise level t = 4 (2 of 4 samples) at iteration 1; "
        "from there on all 3 updates of generator were skipped"
    )


def test_a_gradient_alone_and_a_quantity_alone() -> None:
    own = journal()
    for _ in range(3):
        own.add([{}], {"generator": torch.tensor(math.inf)})
    with pytest.raises(NonFiniteError, match="generator: the gradient became inf while its losses were finite"):
        own.record()
    own = journal()
    own.add([{"generator/h": PerSample(torch.tensor([math.inf]), torch.ones(1))}], {"generator": torch.ones(())})
    with pytest.raises(NonFiniteError, match=r"generator: h became inf .* in an update that was applied"):
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

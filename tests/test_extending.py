"""The worked examples of docs/extending.md, as they stand there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fdistill import distill, get_divergence, load_config
from fdistill.base.errors import ConfigError
from fdistill.divergence import DIVERGENCES
from fdistill.methods import METHODS
from fdistill.training.journal import read_records
from support.extending import blocks, run

SHORT = {
    "iterations": 2,
    "batch_size": 8,
    "log.every": 1,
    "log.samples_every": 0,
    "log.tracker": "none",
    "device": "cpu",
}


@pytest.mark.parametrize(("heading", "file"), [("A family of teachers", "conv_family"), ("A metric", "mean_shift")])
def test_the_page_shows_what_other_tests_run(heading: str, file: str) -> None:
    code = (Path(__file__).parent / "support" / f"{file}.py").read_text(encoding="utf-8")
    assert blocks(heading)[0] == f"# file: {file}.py\n{code}"


@pytest.mark.parametrize("heading", ["A family of teachers", "A metric"])
def test_a_row_registers_what_its_file_holds(heading: str, tmp_path: Path) -> None:
    from evaluation.protocols import PROTOCOLS
    from fdistill.adapters import FAMILIES

    before = [dict(FAMILIES), dict(PROTOCOLS)]
    try:
        for code in blocks(heading):
            run(code, tmp_path)
        added = [table.keys() - rows.keys() for table, rows in zip((FAMILIES, PROTOCOLS), before, strict=True)]
        assert added == ([{"ConvNet"}, set()] if heading == "A family of teachers" else [set(), {"digits-shift"}])
    finally:
        for table, rows in zip((FAMILIES, PROTOCOLS), before, strict=True):
            table.clear()
            table.update(rows)


@pytest.fixture(autouse=True)
def _tables_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tables: list[dict[str, object]] = [DIVERGENCES, METHODS]  # type: ignore[list-item]
    before = [dict(table) for table in tables]
    monkeypatch.syspath_prepend(tmp_path)
    loaded = set(sys.modules)
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)
    for name in set(sys.modules) - loaded:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_a_divergence(tmp_path: Path) -> None:
    for code in blocks("A divergence"):
        run(code, tmp_path)
    divergence = get_divergence("le-cam")
    r = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(divergence.f(r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(divergence.weight(r.detach()), r.detach() ** 2 * curvature)
    assert divergence.powers is not None
    factor, power, power1p = divergence.powers
    torch.testing.assert_close(divergence.weight(r.detach()), (factor * r**power * (1 + r) ** power1p).detach())
    distill("digits", output=tmp_path / "run", divergence="le-cam", **SHORT)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["generator/h_min"] < records[-1]["generator/h_max"]


def test_an_objective(tmp_path: Path) -> None:
    for code in blocks("An objective"):
        run(code, tmp_path)
    weak, strong = (
        read_records(
            distill(
                "digits", output=tmp_path / str(strength), method="sds", **SHORT, **{"objective.strength": strength}
            ).parent.joinpath("metrics.jsonl")
        )[0]
        for strength in (0.5, 1.0)
    )
    # The value is mean(gradient^2) / 2, and the first update starts from the same student.
    assert weak["generator/matching"] == pytest.approx(strong["generator/matching"] / 4, rel=1e-5)
    assert "generator/gan" not in weak
    with pytest.raises(ConfigError, match=r"objective.strength: got -1; expected a number above 0"):
        load_config("digits", ["method=sds", "objective.strength=-1"])
    with pytest.raises(
        ConfigError, match=r"objective.strength: got 0.5, which method=f-distill does not read; it is for"
    ):
        load_config("digits", ["objective.strength=0.5"])

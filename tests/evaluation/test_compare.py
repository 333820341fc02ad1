from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.text
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.compare import compare, short_names
from evaluation.comparison.entries import comparison_of, read_entry
from evaluation.comparison.figure import draw
from evaluation.comparison.table import markdown_table, text_table
from evaluation.protocols import PROTOCOLS, higher_is_better
from fdistill.base.errors import ArgumentError, FDistillError, OutputError


def result(
    metrics: dict[str, Any],
    spread: dict[str, Any] | None = None,
    of: str = "20 bootstrap replicates",
    **provenance: Any,
) -> dict[str, Any]:
    """What `evaluate` returns, as far as it matters here."""
    usual = {
        "protocol": "cifar10-fid50k",
        "num_samples": 50000,
        "reference": {"name": "/data/cifar10.npz", "sha256": "d38ed10b" * 8},
        "extractors": {"inception": {"sha256": "6726825d" * 8, "published": True, "preparation": "TF1 bilinear"}},
        "kind": "student",
        "guidance": None,
        "evaluations_per_image": 1.0,
        "seconds_per_image": 0.002,
        "device": "cuda",
    }
    spreads = {name: {"value": value, "of": of} for name, value in (spread or {}).items()}
    return {"metrics": metrics, "spread": spreads, "provenance": usual | provenance}


def write(folder: Path, **results: dict[str, Any]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json" for name in results]
    for path, value in zip(paths, results.values(), strict=True):
        path.write_text(json.dumps(value))
    return paths


def of(metrics: list[str] | None = None, **results: dict[str, Any]) -> Any:
    return comparison_of([read_entry(name, name, value) for name, value in results.items()], metrics)


def row(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(f"{name} "))


TEACHER = {"kind": "teacher", "evaluations_per_image": 35.0, "seconds_per_image": 0.07, "guidance": 1.0}


def test_the_table_as_it_is_read(tmp_path: Path) -> None:
    """The whole of it, by hand: aligned, rows as given, the best of each metric marked, units in the notes."""
    paths = write(
        tmp_path,
        teacher=result({"fid": 1.97, "precision": 0.69}, {"fid": 0.011}, **TEACHER),
        student=result({"fid": 12.031, "precision": 0.71}, {"fid": 0.2}),
    )
    assert text_table(compare(paths)).splitlines() == [
        "Protocol cifar10-fid50k, 50000 samples, reference cifar10.npz d38ed10b",
        "",
        "                       fid  precision  evaluations/image  seconds/image",
        "-----------------------------------------------------------------------",
        "teacher   1.970 +- 0.011 *   0.6900                   35           0.07",
        "student  12.031 +- 0.200     0.7100 *                  1          0.002",
        "",
        "* the best, and those whose spread touches its; lower is better: fid; higher is better: precision.",
        "+- is over: 20 bootstrap replicates (fid).",
        "Seconds on cuda.",
    ]


def test_markdown_says_the_same(tmp_path: Path) -> None:
    paths = write(
        tmp_path / "in",
        teacher=result({"fid": 1.97, "class_accuracy": 0.69}, {"fid": 0.011}, **TEACHER),
        student=result({"fid@5000": 2.031, "class_accuracy@5000": 0.71}, {"fid@5000": 0.2}, num_samples=5000),
    )
    comparison = compare(paths, names=["the | teacher", "my_*student*"], output=tmp_path / "out")
    lines = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert markdown_table(comparison).splitlines() == lines
    assert lines[2] == r"|  | fid ↓ | class\_accuracy ↑ | evaluations/image | seconds/image |"
    assert lines[4] == r"| the \| teacher | 1.970 ± 0.011 | 0.6900 | 35 | 0.07 |"
    assert lines[5] == r"| my\_\*student\* | 2.031 ± 0.200 <sup>a</sup> | 0.7100 <sup>a</sup> | 1 | 0.002 |"
    assert "<sup>a</sup> Not ranked: samples 5000, others 50000." in lines


def test_results_are_kept_with_the_table(tmp_path: Path) -> None:
    results = {"a": result({"fid": 2.0}), "b": result({"fid": 3.0}, num_samples=10)}
    compare(write(tmp_path, **results), output=tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [entry["name"] for entry in kept["results"]] == ["a", "b"]
    assert [entry["not_ranked"] for entry in kept["results"]] == [{}, {"fid": "samples 10, others 50000"}]
    for entry in kept["results"]:
        assert {key: entry[key] for key in ("metrics", "spread", "provenance")} == results[entry["name"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json",
        "comparison.md",
        "comparison.png",
    ]
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.size == (1800, 840)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        *(
            (name, False)
            for name in ("fid", "kid", "fd_digits", "fd_dinov2", "fid_infinity", "patch_fid", "kid_digits")
        ),
        *((name, False) for name in ("fd_digits_infinity", "fd_clip")),
        *((name, True) for name in ("precision", "recall", "density", "coverage", "inception_score", "class_accuracy")),
        *((name, True) for name in ("clip_cosine", "clip_x100", "clipscore", "clip_digits", "clip_own")),
        ("prompt_accuracy", True),
        *((name, True) for name in ("authenticity", "lpips_diversity", "diversity_digits")),
        *((name, None) for name in ("ink_bold", "ink_thin", "something", "fid_of_another_program")),
    ],
)
def test_which_way_is_better(metric: str, higher: bool | None) -> None:
    assert higher_is_better(metric) is higher
    marked = {
        name: row(text_table(of(low=result({metric: 0.1}), high=result({metric: 0.9}))), name).count("*")
        for name in ("low", "high")
    }
    assert marked == {"low": int(higher is False), "high": int(higher is True)}


def test_a_score_means_the_same_in_every_protocol() -> None:
    """Results in files are ranked by the names of their scores: two metrics of one name must not differ."""
    found: dict[str, set[Any]] = {}
    for protocol in PROTOCOLS.values():
        for metric in protocol.metrics:
            for output in metric.outputs:
                found.setdefault(output, set()).add((metric.higher_is_better, metric.against))
    assert len(found) > 25
    assert {output: kinds for output, kinds in found.items() if len(kinds) > 1} == {}


def test_a_lead_within_the_spread_is_none() -> None:
    def best(**spreads: float) -> list[str]:
        values = {"a": 2.0, "b": 2.1, "c": 2.4}
        entries = {name: result({"fid": values[name]}, {"fid": spread}) for name, spread in spreads.items()}
        table = text_table(of(**entries))
        return [name for name in spreads if "*" in row(table, name)]

    assert best(a=0.04, b=0.05, c=0.05) == ["a"]
    assert best(a=0.06, b=0.05, c=0.05) == ["a", "b"]
    assert best(a=0.06, b=0.05, c=0.35) == ["a", "b", "c"]


def test_decimals_show_two_digits_of_the_smallest_spread() -> None:
    table = text_table(of(a=result({"kid": 0.00123456}, {"kid": 0.000456}), b=result({"kid": 0.5}, {"kid": 0.0123})))
    assert "0.00123 +- 0.00046 *" in row(table, "a")
    assert "0.50000 +- 0.01230" in row(table, "b")
    assert "123.5" in row(text_table(of(a=result({"fid": 123.456}), b=result({"fid": 7.0}))), "a")
    assert "0.0000" in row(text_table(of(a=result({"fid": 0.0}), b=result({"fid": 0.123456}))), "a")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_samples": 5000}, "samples 5000, others 50000"),
        (
            {"reference": {"name": "/other/cifar10.npz", "sha256": "0" * 64}},
            "reference cifar10.npz 00000000, others cifar10.npz d38ed10b",
        ),
        ({"reference": None}, "reference none, others cifar10.npz d38ed10b"),
        (
            {"extractors": {"inception": {"sha256": "1" * 64, "preparation": "TF1 bilinear"}}},
            "extractor inception 11111111 (TF1 bilinear), others 6726825d (TF1 bilinear)",
        ),
        (
            {"extractors": {"inception": {"sha256": "6726825d" * 8, "preparation": "bicubic"}}},
            "extractor inception 6726825d (bicubic), others 6726825d (TF1 bilinear)",
        ),
        ({"lossy_files": 3}, "files lossy, others lossless"),
    ],
)
def test_what_was_measured_otherwise_is_not_ranked(changed: dict[str, Any], said: str) -> None:
    comparison = of(
        odd=result({"fid": 1.95}, **changed), a=result({"fid": 2.0}, {"fid": 0.1}), b=result({"fid": 3.0}, **TEACHER)
    )
    table = text_table(comparison)
    assert "[a]" in row(table, "odd")
    assert "*" not in row(table, "odd")
    assert "*" in row(table, "a")
    assert f"[a] Not ranked: {said}." in table.splitlines()
    points = draw(comparison).axes[0].containers
    assert [container[0].get_markerfacecolor() == "white" for container in points] == [True, False, False]
    assert "odd (" in below(draw(comparison))


def test_the_full_name_of_a_score_counts_too() -> None:
    weights = "fid (other weights 1a2b3c4d)"
    table = text_table(of(a=result({"fid": 2.0}), b=result({"fid": 3.0}), odd=result({weights: 1.0})))
    assert f"[a] Not ranked: measured as {weights}, others fid." in table
    assert "*" in row(table, "a")
    alike = text_table(of(a=result({"fid@9": 2.0}, num_samples=9), b=result({"fid@9": 3.0}, num_samples=9)))
    assert "fid@9" in alike.splitlines()[2]
    assert "Not ranked" not in alike
    assert "*" in row(alike, "a")


def test_most_decide_what_is_odd_and_of_two_the_first() -> None:
    few = {"num_samples": 5000}
    table = text_table(
        of(a=result({"fid": 2.0}), b=result({"fid@5000": 3.0}, **few), c=result({"fid@5000": 4.0}, **few))
    )
    assert "fid@5000" in table.splitlines()[2]
    assert ["[a]" in row(table, name) for name in "abc"] == [True, False, False]
    assert "Not ranked: samples 50000, others 5000." in table
    two = text_table(of(b=result({"fid@5000": 3.0}, **few), a=result({"fid": 2.0})))
    assert ["[a]" in row(two, name) for name in "ab"] == [True, False]


def test_the_reference_is_no_matter_to_a_score_without_one() -> None:
    other = {"reference": {"name": "other.npz", "sha256": "0" * 64}}
    comparison = of(
        a=result({"fid": 2.0, "clip_cosine": 0.2, "class_accuracy": 0.5}),
        b=result({"fid": 1.0, "clip_cosine": 0.3, "class_accuracy": 0.6}, **other),
    )
    assert [set(entry.unlike) for entry in comparison.entries] == [set(), {"fid"}]


def test_extractors_that_one_alone_used_are_no_difference() -> None:
    more = {"inception": {"sha256": "6726825d" * 8, "preparation": "TF1 bilinear"}, "dinov2": {"sha256": "2" * 64}}
    comparison = of(a=result({"fid": 2.0}), b=result({"fid": 3.0, "fd_dinov2": 90.0}, extractors=more))
    assert not any(entry.unlike for entry in comparison.entries)


def test_seconds_of_several_devices_are_kept_apart() -> None:
    comparison = of(
        a=result({"fid": 2.0}), b=result({"fid": 3.0}, device="cpu", timed_batch_size=8), c=result({"fid": 4.0})
    )
    table = text_table(comparison)
    assert [re.findall(r"0\.002 \[(.)\]$", row(table, name)) for name in "abc"] == [["a"], ["b"], ["a"]]
    assert "[a] Seconds on cuda." in table
    assert "[b] Seconds on cpu, 8 images at a time." in table
    figure = draw(comparison)
    assert sorted(names_in(figure, 1)) == ["a", "b (on cpu)", "c"]
    assert sorted(names_in(figure, 0)) == ["a", "b", "c"]
    assert "Seconds on cuda, unless stated otherwise." in below(figure)


def test_guidance_is_named_if_there_is_any() -> None:
    assert "Guidance" not in text_table(of(a=result({"fid": 2.0}), b=result({"fid": 3.0}, **TEACHER)))
    guided = of(a=result({"fid": 2.0}), b=result({"fid": 3.0}, guidance=7.5), c=result({"fid": 3.0}, guidance=7.5))
    assert "Guidance scale: none (a); 7.5 (b, c)." in text_table(guided)


def test_spreads_of_several_kinds_are_kept_apart() -> None:
    table = text_table(
        of(
            a=result({"fid": 2.0, "recall": 0.5}, {"fid": 0.1, "recall": 0.1}),
            b=result({"fid": 3.0}, {"fid": 0.1}),
            c=result({"fid": 4.0}, {"fid": 0.1}, of="3 seeds"),
        )
    )
    assert "+- is over: 20 bootstrap replicates (fid, recall); 3 seeds (fid of c)." in table


def test_columns_and_the_metric_that_is_drawn() -> None:
    entries = {"a": result({"recall": 0.5, "fid": 2.0}), "b": result({"fid": 3.0, "kid": 0.1})}
    assert of(**entries).metrics == ("fid", "recall", "kid")
    chosen = of(["kid", "fid", "kid"], **entries)
    assert chosen.metrics == ("kid", "fid")
    assert row(text_table(chosen), "a").split()[1] == "-"
    figure = draw(chosen)
    assert figure.axes[0].get_ylabel() == "kid (lower is better)"
    assert names_in(figure, 0) == ["b"]
    assert "a (no kid)" in below(figure)


def test_without_counts_or_seconds_there_is_a_dash_and_no_point() -> None:
    unknown = {"evaluations_per_image": None, "seconds_per_image": None, "device": None, "kind": None}
    comparison = of(a=result({"fid": 2.0}), images=result({"fid": 1.0}, **unknown))
    assert row(text_table(comparison), "images").split()[-2:] == ["-", "-"]
    figure = draw(comparison)
    assert names_in(figure, 0) == names_in(figure, 1) == ["a"]
    assert "Not in both panels: images (no evaluations per image, no seconds per image)." in below(figure)
    nothing = draw(of(x=result({"fid": 2.0}, **unknown), y=result({"fid": 1.0}, **unknown)))
    assert names_in(nothing, 0) == names_in(nothing, 1) == ["not measured"]


def below(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def texts_in(figure: Figure, panel: int) -> list[matplotlib.text.Text]:
    return list(figure.axes[panel].texts)


def names_in(figure: Figure, panel: int) -> list[str]:
    return [text.get_text() for text in texts_in(figure, panel)]


def test_one_checkpoint_with_several_numbers_of_steps_is_a_line() -> None:
    def teacher(evaluations: float, fid: float, **more: Any) -> dict[str, Any]:
        facts = {**TEACHER, "checkpoint_sha256": "a" * 64, "sampler": "heun", **more}
        return result({"fid": fid}, **(facts | {"evaluations_per_image": evaluations}))

    comparison = of(
        long=teacher(35, 2.0),
        short=teacher(9, 8.0),
        guided=teacher(17, 3.0, guidance=2.0),
        other=teacher(19, 5.0, checkpoint_sha256="b" * 64),
        student=result({"fid": 4.0}),
        few=result({"fid@5000": 9.0}, **TEACHER, checkpoint_sha256="a" * 64, sampler="heun", num_samples=5000),
    )
    left = draw(comparison).axes[0]
    lines = [line.get_xydata().tolist() for line in left.lines if line.get_linestyle() == "-"]
    assert [line for line in lines if len(line) > 1] == [[[9, 8], [35, 2]]]
    colours = [container[0].get_color() for container in left.containers]
    assert colours[0] == colours[1] == colours[5]
    assert len(set(colours)) == 4
    again = of(a=teacher(35, 2.0), b=teacher(35, 2.2))  # of two seeds
    assert not [
        line for line in draw(again).axes[0].lines if len(line.get_xydata()) > 1 and line.get_linestyle() == "-"
    ]


def test_points_lie_where_the_numbers_say() -> None:
    comparison = of(
        a=result({"fid": 2.0}, {"fid": 0.5}), b=result({"fid": 20.0}, {"fid": 1.0}, **TEACHER), c=result({"fid": 4.0})
    )
    figure = draw(comparison)
    for axes, across in zip(figure.axes, ([1, 35, 1], [0.002, 0.07, 0.002]), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert [tuple(container[0].get_xydata()[0]) for container in axes.containers] == list(
            zip(across, [2.0, 20.0, 4.0], strict=True)
        )
        bars = [container[2][0].get_segments()[0][:, 1].tolist() for container in axes.containers[:2]]
        assert bars == [[1.5, 2.5], [19.0, 21.0]]
        assert [container[0].get_marker() for container in axes.containers] == ["o", "s", "o"]
        assert axes.get_xlim()[0] < min(across) < max(across) < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < 1.5 < 21.0 < axes.get_ylim()[1]
    assert figure.axes[0].get_xlabel() == "evaluations per image"
    assert figure.axes[1].get_xlabel() == "seconds per image"
    assert figure.axes[0].get_ylabel() == "fid (lower is better)"
    assert "Bars: spread over 20 bootstrap replicates." in below(figure)
    near = draw(of(a=result({"fid": 2.0}), b=result({"fid": 2.1})))
    assert near.axes[0].get_yscale() == "linear"
    for not_positive in (-0.001, 0.0):
        assert draw(of(a=result({"kid": not_positive}), b=result({"kid": 2.1}))).axes[0].get_yscale() == "linear"
    share = draw(of(a=result({"recall": 0.01}), b=result({"recall": 0.9})))
    assert share.axes[0].get_yscale() == "linear"
    assert share.axes[0].get_ylabel() == "recall (higher is better)"


def test_names_are_no_formulas(tmp_path: Path) -> None:
    paths = write(tmp_path, a=result({"fid": 2.0}), b=result({"fid": 3.0}, seconds_per_image=None))
    comparison = compare(paths, names=[r"$\frac$", r"_b$x$"], output=tmp_path / "out")
    assert sorted(names_in(draw(comparison), 0)) == [r"$\frac$", r"_b$x$"]


def close_together(count: int) -> dict[str, dict[str, Any]]:
    """Students of one evaluation and nearly one quality, as they come out of a study, and teachers."""
    students = {
        f"{name}-divergence": result({"fid": 2.0 + 0.01 * i}, {"fid": 0.2}, seconds_per_image=0.002 + 0.00001 * i)
        for i, name in enumerate(("forward-kl", "reverse-kl", "jensen-shannon", "softened", "hellinger", "neyman"))
    }
    others = {
        "teacher of 18 steps": result({"fid": 1.9}, {"fid": 0.2}, **TEACHER),
        "two steps": result({"fid": 1.95}, {"fid": 0.2}, evaluations_per_image=2.0, seconds_per_image=0.004),
        "pipeline": result({"fid": 9.0}, {"fid": 0.3}, kind="pipeline", evaluations_per_image=4.0),
    }
    return dict([*list(students.items())[: count - min(3, count - 1)], *list(others.items())[: min(3, count - 1)]])


def in_a_row(count: int) -> dict[str, dict[str, Any]]:
    """Points that each are where the name of the one before would like to be."""
    return {
        f"{'long ' * 4}name {i}": result({"fid": 2.0}, {"fid": 0.1}, evaluations_per_image=2**i, seconds_per_image=2**i)
        for i in range(count)
    }


@pytest.mark.parametrize("entries", [*map(close_together, (2, 5, 9)), in_a_row(4)], ids=["2", "5", "9", "row"])
def test_names_cover_neither_one_another_nor_points(entries: dict[str, Any]) -> None:
    figure = draw(of(**entries))
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for panel, axes in enumerate(figure.axes):
        texts = texts_in(figure, panel)
        assert sorted(names_in(figure, panel)) == sorted(entries)
        for text in texts:
            text.update_positions(renderer)  # type: ignore[attr-defined]
        boxes = [matplotlib.text.Text.get_window_extent(text, renderer) for text in texts]  # without the line
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other)
        frame = axes.get_window_extent(renderer)
        for text, box in zip(texts, boxes, strict=True):
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1, text
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1, text
            for container in axes.containers:
                x, y = axes.transData.transform(container[0].get_xydata()[0])
                assert not (box.x0 - 3 < x < box.x1 + 3 and box.y0 - 3 < y < box.y1 + 3), text
    assert figure.get_tightbbox(renderer).x0 >= -0.01  # nothing is cut off


def test_a_name_among_near_points_has_a_line_to_its_own() -> None:
    figure = draw(of(**close_together(5)))
    for text in texts_in(figure, 0):
        crowded = "divergence" in text.get_text()
        assert (text.arrow_patch is not None) == crowded  # type: ignore[attr-defined]
    points = {c[0].get_color(): tuple(c[0].get_xydata()[0]) for c in figure.axes[0].containers}
    assert sorted(points.values()) == sorted(text.xy for text in texts_in(figure, 0))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/scores.json", "runs/b/scores.json"], ["a", "b"]),
        (["a/scores/student.json", "a/scores/teacher-1.json"], ["student", "teacher-1"]),
        (["a/student.json", "b/student.json", "teacher"], ["a/student", "b/student", "teacher"]),
        (["x/a/s", "y/a/s", "z"], ["x/a/s", "y/a/s", "z"]),
        (["stabilityai/sd-turbo", "runs/digits"], ["sd-turbo", "digits"]),
        (["digits", "digits.json"], ["digits", "digits.json"]),
        (["a", "b/a"], ["a", "b/a"]),
        (["student.v1.json", "student.v2.json"], ["student.v1", "student.v2"]),
    ],
)
def test_names_are_short_and_tell_apart(inputs: list[str], names: list[str]) -> None:
    assert short_names(inputs) == names


GOOD = result({"fid": 2.0})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"expected a file of `fdistill evaluate --output`"),
        ("[]", r"expected a JSON object, got list"),
        ("{}", r"has no metrics or no provenance"),
        (json.dumps(GOOD | {"metrics": {}}), r"has no metrics"),
        (json.dumps(GOOD | {"provenance": {}}), r"does not name its protocol"),
        (json.dumps(GOOD | {"metrics": {"fid": None}}), r"fid: got None, expected a finite number"),
        (json.dumps(GOOD | {"metrics": {"fid": float("nan")}}), r"fid: got nan, expected a finite number"),
        (json.dumps(GOOD | {"metrics": {"fid": True}}), r"fid: got True"),
        (json.dumps(GOOD | {"metrics": {"fid": "2"}}), r"fid: got '2'"),
        (json.dumps(result({"fid": 1.0, "fid@500": 2.0})), r"has 'fid' and 'fid@500'; expected one number for 'fid'"),
        (json.dumps(result({"fid": 1.0}, {"fid": "x"})), r"spread of fid: got 'x'"),
        (json.dumps(GOOD | {"spread": {"fid": 3}}), r"spread of fid"),
        (json.dumps(result({"fid": 1.0}, seconds_per_image=0)), r"seconds_per_image: got 0, expected a number above 0"),
        (json.dumps(result({"fid": 1.0}, evaluations_per_image="1")), r"evaluations_per_image: got '1'"),
        (
            json.dumps(result({"fid": 1.0}, protocol="digits")),
            r"protocol 'digits'.*'cifar10-fid50k'.*cannot be compared",
        ),
        (json.dumps(result({"kid": 1.0})), r"no metric that all have: good has fid; bad has kid"),
    ],
)
def test_files_that_do_not_belong_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (good,) = write(tmp_path, good=GOOD)
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ArgumentError, match=said):
        compare([good, tmp_path / "bad.json"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path, a=GOOD, b=result({"fid": 3.0}))
    with pytest.raises(ArgumentError, match="got 1; expected two or more"):
        compare([a])
    with pytest.raises(ArgumentError, match="twice"):
        compare([a, b, a])
    with pytest.raises(ArgumentError, match=r"nowhere\.json: cannot be read"):
        compare([a, tmp_path / "nowhere.json"])
    with pytest.raises(ArgumentError, match="did you mean 'fid'"):
        compare([a, b], metrics=["fit"])
    with pytest.raises(ArgumentError, match="got 1 for 2 inputs"):
        compare([a, b], names=["a"])
    for names in (["a", "a"], ["a", " "], ["a", "b\nc"]):
        with pytest.raises(ArgumentError, match="each once"):
            compare([a, b], names=names)
    with pytest.raises(ArgumentError, match="nothing is left to evaluate"):
        compare([a, b], num_images=10)
    with pytest.raises(ArgumentError, match="to be compared by 'digits'"):
        compare([a, b], protocol="digits")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="not an empty folder"):
        compare([a, b], output=tmp_path / "full")
    with pytest.raises(OutputError, match="cannot write"):
        compare([a, b], output=a / "out")


def test_results_alone_need_no_torch(tmp_path: Path) -> None:
    paths = [str(path) for path in write(tmp_path, a=GOOD, b=result({"fid": 3.0}))]
    code = f"import sys; from evaluation.compare import compare; compare({paths!r}, output={str(tmp_path / 'out')!r})"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_two_things_are_measured_and_compared(tiny_teacher: Path, tmp_path: Path) -> None:
    """A teacher, a folder of real digits and a result of before: what was no result yet is measured by its protocol."""
    from evaluation.evaluate import evaluate
    from fdistill.data.digits import load_digits

    images, labels = load_digits()
    real = tmp_path / "real"
    real.mkdir()
    for i, image in enumerate(images[:200]):
        Image.fromarray(image[0].numpy()).save(real / f"{i:06d}.png")
    (real / "manifest.json").write_text(json.dumps({"labels": labels[:200].tolist()}))
    before = tmp_path / "before.json"
    evaluate(tiny_teacher, metrics=["fd_digits", "class_accuracy"], num_images=200, num_steps=1, output=before)
    comparison = compare(
        [tiny_teacher, before, real],
        output=tmp_path / "out",
        metrics=["class_accuracy", "fd_digits", "density_coverage"],
        num_images=200,
        num_steps=2,
        replicates=3,
    )
    assert comparison.metrics == ("class_accuracy", "fd_digits", "density", "coverage")
    new, old, folder = comparison.entries
    assert [entry.name for entry in comparison.entries] == ["tiny", "before", "real"]
    assert old.result == json.loads(before.read_text())
    assert (old.evaluations_per_image, new.evaluations_per_image, folder.evaluations_per_image) == (1, 3, None)
    assert new.seconds_per_image is not None
    assert new.seconds_per_image > 0
    assert new.scores["fd_digits"].spread_of == "3 bootstrap replicates within classes"
    assert not any(entry.unlike for entry in comparison.entries)
    table = text_table(comparison)
    assert table.startswith("Protocol digits, 200 samples, reference digits ")
    assert re.split("  +", table.splitlines()[2].strip()) == [
        *(f"{metric}@200" for metric in comparison.metrics),
        "evaluations/image",
        "seconds/image",
    ]
    assert row(table, "real").count("*") == 4
    direct = evaluate(tiny_teacher, metrics=["fd_digits"], num_images=200, num_steps=2, replicates=0)
    assert new.scores["fd_digits"].value == pytest.approx(direct["metrics"]["fd_digits@200"])
    assert names_in(draw(comparison), 0) == ["tiny", "before"]


def test_nothing_is_left_where_measuring_fails(tiny_teacher: Path, tmp_path: Path) -> None:
    """All results are read before anything is measured, so a bad one costs no hours."""
    with pytest.raises(ArgumentError, match="cannot be read"):
        compare([tmp_path / "nowhere", tmp_path / "nowhere.json"])
    (done,) = write(tmp_path, done=result({"fd_digits": 1.0}, protocol="digits"))
    with pytest.raises(FDistillError, match="nowhere"):
        compare([done, tmp_path / "nowhere"], output=tmp_path / "out")
    (other,) = write(tmp_path, other=result({"fid": 1.0}, protocol="folder"))
    with pytest.raises(ArgumentError, match="protocol 'folder' takes any number"):
        compare([other, tiny_teacher], output=tmp_path / "out")
    with pytest.raises(ArgumentError, match="did you mean 'fd_digits'"):
        compare([done, tiny_teacher], metrics=["fd_digit"], output=tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.evaluate.evaluate", lambda *_, **__: pytest.fail("measured too early"))
        with pytest.raises(FDistillError, match="'nowhere': no such folder"):
            compare([tiny_teacher, "nowhere"])
    images = tmp_path / "images"
    images.mkdir()
    Image.new("L", (8, 8)).save(images / "0.png")
    with pytest.raises(ArgumentError, match="num_steps: none of images takes it; leave it out"):
        compare([done, images], num_steps=3)
    shutil.rmtree(images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done.json", "other.json"]


def test_what_was_compared_is_told_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path, a=GOOD, b=result({"fid": 3.0}))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"(?s)No space left on device.*what was compared:\n.*fid.*3\.0"):
        compare([a, b], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()

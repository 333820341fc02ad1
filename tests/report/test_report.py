"""`fdistill report`: what is on the page, in a real browser where one is there."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from typer.testing import CliRunner

from fdistill import distill
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.commands.cli import app
from fdistill.report.page import write_report
from fdistill.report.panels import panels, spread
from fdistill.report.pictures import encoded
from fdistill.report.run import named_runs, read_run
from fdistill.training.alarms import MEANING, alarms, drifts
from support.browser import running_browser

MARKUP = "</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits, whose records and prompts are then given an alarm and markup."""
    folder = tmp_path_factory.mktemp("report") / "first"
    settings = {"eval.every": 2, "eval.num_images": 128, "log.every": 1, "log.samples_every": 2, "log.tracker": "none"}
    distill("digits", output=folder, iterations=4, batch_size=16, **settings)
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records[1:3]:
        record["alarms"] = ["samples alike"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = json.loads((folder / "student" / "fdistill_student.json").read_text())
    (folder / "student" / "fdistill_student.json").write_text(json.dumps({**facts, "prompts": [MARKUP]}))
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert result.output == f"report: {run / 'report.html'}\n"
    return run / "report.html"


def test_one_file_has_everything_and_asks_no_other_host(page: Path, run: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 10_000_000
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)  # Plotly's names hosts that it does not ask
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", own)
    assert "samples alike, iterations 2 to 3: images of one class" in own
    assert "4 of 4 iterations" in own
    assert "the best fd_digits" in own
    assert str(escape(MARKUP)) in own
    assert MARKUP not in own
    assert [f'alt="{whose}"' in own for whose in ("Teacher", "Data")] == [True, True]
    for words in ("jensen-shannon", "torch", "1,797 images in 10 classes", "gan_weight:", "again.yaml"):
        assert words in own, words


def test_the_settings_on_the_page_are_the_runs(page: Path, run: Path, tmp_path: Path) -> None:
    """Saved as the page says, they make the same run."""
    found = re.search(r"<summary>All settings</summary><pre>(.*?)</pre>", page.read_text(), re.DOTALL)
    assert found is not None
    again = tmp_path / "again.yaml"
    again.write_text(html.unescape(found[1]), encoding="utf-8")
    assert read_run(run).settings == html.unescape(found[1])
    from fdistill.config.reading import load_config

    assert load_config(str(again)) == read_run(run).config


def test_every_quantity_is_the_records(run: Path) -> None:
    """The curves' points are those of metrics.jsonl; the ratios' histograms are shares of each bin."""
    read = read_run(run)
    (metric,) = (name for name in read.records[1] if name.startswith("eval/fd_digits"))
    title = f"Score: {metric.removeprefix('eval/')}"
    made = {panel.title: panel for panel in panels([read], {metric.removeprefix("eval/"): 0.5})}
    score = made[title].figure
    assert list(score.data[0].x) == [2, 4]
    assert list(score.data[0].y) == [record[metric] for record in read.records if metric in record]
    assert score.layout.shapes[0].y0 == 0.5
    assert "The dashed line is the teacher." in made[title].reading
    norms = made["Gradient norms before clipping"].figure
    by_name = {trace.name: list(trace.y) for trace in norms.data}
    assert by_name["student grad norm"] == [record["generator/grad_norm"] for record in read.records]
    ratios = made["Density ratios per noise bin"].figure
    shares = np.array(ratios.data[0].z)
    counts = np.array(read.records[-1]["generator/log_ratio_counts"])
    np.testing.assert_allclose(shares, counts / np.maximum(1, counts.sum(1, keepdims=True)))
    assert [step.label for step in ratios.layout.sliders[0].steps] == ["1", "2", "3", "4"]
    assert all(panel.reading for panel in made.values())
    assert made.keys() >= {
        "Student's losses",
        "Fake score's loss",
        "Discriminator's losses",
        "Discriminator's accuracy and clamped ratios",
        "Discriminator's accuracy per noise bin",
        "The divergence's weight h(r)",
        "How samples look, divided by the teacher's",
        "Images per second",
        "Memory in use at most, GB",
    }


def test_the_command_on_the_page_draws_the_teachers_line(run: Path, tmp_path: Path) -> None:
    scored = shutil.copytree(run, tmp_path / "scored")
    readings = [panel.reading for panel in panels([read_run(scored)], {}) if panel.title.startswith("Score: ")]
    command = readings[0].partition("make this page again after: ")[2]
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert str(scored / "teacher.json") in command
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(scored), "--output", str(page)]).exit_code == 0
    assert page.read_text(encoding="utf-8").count("The dashed line is the teacher.") == len(readings)

    other = shutil.copytree(scored, tmp_path / "other")  # of another teacher, worse by one metric
    facts = json.loads((other / "teacher.json").read_text())
    (name,) = (name for name in facts["metrics"] if name.startswith("fd_digits"))
    facts["metrics"][name] += 1
    (other / "teacher.json").write_text(json.dumps(facts))
    write_report(named_runs([scored, other]), page)
    assert page.read_text(encoding="utf-8").count("The dashed line is the teacher.") == len(readings) - 1


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "elsewhere" / "first")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"(?m)^seed: \d+", "seed: 7", config))
    output = tmp_path / "two.html"
    runs = named_runs([run, other])
    assert [each.name for each in runs] == [f"{run.parent.name}/first", "elsewhere/first"]
    write_report(runs, output)
    text = output.read_text(encoding="utf-8")
    table = text.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td><code>(.*?)</code>", table) == ["seed"]
    score = next(panel for panel in panels(runs, {}) if panel.title.startswith("Score: fd_digits"))
    assert {trace.name for trace in score.figure.data} >= {each.name for each in runs}


def test_a_run_that_has_only_begun(run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(run / "config.yaml", young)
    (young / "metrics.jsonl").write_text("")
    write_report([read_run(young)], tmp_path / "young.html")
    text = (tmp_path / "young.html").read_text(encoding="utf-8")
    assert "0 of 4 iterations; not finished" in text
    assert "Nothing was recorded yet." in text
    assert "This run saved no samples" in text


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.yaml and metrics\.jsonl; expected the folder"):
        read_run(tmp_path)
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "samples" / "teacher.png").write_bytes(b"no picture")
    with pytest.raises(CheckpointError, match=r"teacher\.png: is no picture"):
        write_report([read_run(broken)], tmp_path / "broken.html")
    assert not (tmp_path / "broken.html").exists()
    with pytest.raises(ArgumentError, match=r"teacher-scores: has fid, and the runs' scores are fd_digits@128, "):
        write_report([read_run(run)], tmp_path / "none.html", {"fid": 2.0})
    (tmp_path / "scores.json").write_text("{}")
    result = CliRunner().invoke(app, ["report", str(run), "--teacher-scores", str(tmp_path / "scores.json")])
    assert isinstance(result.exception, CheckpointError)
    assert "expected the file that `fdistill evaluate TEACHER --output FILE` writes" in str(result.exception)


@pytest.mark.thorough  # by day, a report of the usual grids
def test_large_grids_are_made_to_fit(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(draws.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)).save(paths[-1])
    made = encoded(paths, 400_000)
    assert sum(map(len, made)) <= 400_000
    assert all(uri.startswith("data:image/webp;base64,") for uri in made)
    assert encoded(paths[:1], 10_000_000)[0].startswith("data:image/png;base64,")


def test_sliders_have_the_first_and_the_last() -> None:
    assert spread([5, 6, 7], 4) == [5, 6, 7]
    assert spread(list(range(101)), 5) == [0, 25, 50, 75, 100]


def test_every_alarm_has_its_meaning() -> None:
    bad = {
        "discriminator/accuracy": 1.0,
        "generator/clamped_ratios": 1.0,
        "discriminator/gan_real": 20.0,
    }
    look = {"samples/contrast": 1.0, "samples/teacher_contrast": 0.2, "samples/teacher_diversity": 0.5}
    looks = [{**look, "samples/diversity": value} for value in (0.5, 0.1, 0.1)]
    assert {*alarms([bad] * 3), *drifts(looks)} == MEANING.keys()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as opened:
        yield opened


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_in_a_browser(page: Path, browser: Any, scheme: Any, width: int) -> None:
    """No errors, no requests, visible pictures and figures, a slider that moves, and nothing wider than the screen."""
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page.as_uri())
    opened.wait_for_function(
        "document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length"
    )
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    assert opened.title() == "first: fdistill report"
    for picture in opened.query_selector_all("img"):
        assert picture.evaluate("picture => picture.naturalWidth > 0 && picture.offsetWidth > 100")
    student, before = opened.query_selector("img.student"), opened.get_attribute("img.student", "src")
    assert opened.inner_text(".samples output") == "4"
    opened.evaluate(
        "s => { const r = document.querySelector(s); r.value = 0; r.dispatchEvent(new Event('input')); }",
        ".samples input",
    )
    assert opened.inner_text(".samples output") == "0"
    assert opened.get_attribute("img.student", "src") != before
    assert student.evaluate("picture => picture.decode().then(() => picture.naturalWidth > 0)")
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    edges = "[...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().right)"
    assert max(opened.evaluate(edges)) <= width
    paper, ink = opened.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    opened.screenshot(path=page.parent / f"page-{scheme}-{width}.png", full_page=True)
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    drawn = opened.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert drawn == ink
    opened.close()

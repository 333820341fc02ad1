from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fdistill.commands.cli import app, main


def fdistill(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fdistill", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=None,
        timeout=300,
    )


def test_distil_generate_evaluate(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = [f"teacher={tiny_teacher}", "batch_size=8", "iterations=2", "generator.lr=1e-5"]
    run, images, scores = tmp_path / "run", tmp_path / "images", tmp_path / "scores.json"
    done = fdistill("distill", "digits", *settings, "--output", str(run))
    assert done.returncode == 0, done.stderr
    assert str(run / "student") in done.stdout
    assert "images/s" in done.stderr
    counted = ["--num-images", "70", "--seed", "2", "--class-labels", "0,1"]
    drawn = CliRunner().invoke(app, ["generate", str(run), *counted, "--output", str(images)])
    assert drawn.exit_code == 0, drawn.output
    assert len(list(images.glob("*.png"))) == 70
    asked = ["evaluate", str(images), "--metrics", "fd_digits,class_accuracy", "--output", str(scores)]
    scored = CliRunner().invoke(app, asked)
    assert scored.exit_code == 0, scored.output
    assert re.search(r"fd_digits@70 +\d+\.\d+ \+- \d", scored.output)
    assert set(json.loads(scores.read_text())["metrics"]) == {"fd_digits@70", "class_accuracy@70"}


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    done = CliRunner().invoke(
        app, ["distill", "divergence=forward-kl", "iterations=7", "--output", output, "--dry-run"]
    )
    assert done.exit_code == 0, done.output
    assert "divergence     forward-kl" in done.output
    assert "iterations     7" in done.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["distill", "generate", "evaluate"])
def test_help_has_an_example(command: str) -> None:
    done = fdistill(command, "--help")
    assert done.returncode == 0
    assert f"Example: fdistill {command}" in done.stdout


def test_version() -> None:
    assert re.fullmatch(r"fdistill \d+\.\d+\.\d+\n", fdistill("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "digits", "divergense=js", "--output", "OUT"], "did you mean 'divergence'"),
        (["distill", "digit", "--output", "OUT"], "did you mean 'digits'"),
        (["distill", "one", "two", "--output", "OUT"], "expected one CONFIG"),
        (["generate", "nowhere/student", "--num-images", "3", "--output", "OUT"], "hub gave no model"),
        (["generate", "digits", "--num-images", "0", "--output", "OUT"], "expected at least 1, got 0"),
        (["generate", "digits", "--num-images", "3", "--class-labels", "a", "--output", "OUT"], "whole numbers"),
        (
            ["generate", "digits", "--num-images", "3", "--class-labels", "12", "--output", "OUT"],
            "got 12, expected 0 to 9",
        ),
        (["generate", "digits", "--num-images", "3", "--class-labels", "", "--output", "OUT"], "whole numbers"),
        (["generate", "x" * 300, "--num-images", "3", "--output", "OUT"], "File name too long"),
        (["evaluate", "OUT"], "no such folder"),
        (["evaluate", "digits", "--metrics", ""], "metrics: protocol 'digits' has no ''"),
        (["evaluate", "digits", "--output", "/"], "is a folder"),
    ],
)
def test_errors_are_one_message_and_status_one(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["fdistill", *[part.replace("OUT", str(tmp_path / "out")) for part in arguments]])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().err
    assert exit_.value.code == 1
    assert said.startswith("error: ")
    assert message in said
    assert not any(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_divergence_of_ones_own_works_or_ends_the_process_without_a_traceback(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def f(r):\n    return (r - 1) ** 2\n\ndef g(r):\n    return -((r - 1) ** 2)\n")
    command = Path(sys.executable).with_name("fdistill")
    for function, code, said in (("f", 0, "divergence     mine:f"), ("g", 1, "must be convex")):
        done = subprocess.run(
            [
                command,
                "distill",
                "digits",
                f"teacher={tiny_teacher}",
                f"divergence=mine:{function}",
                "--output",
                "run",
                "--dry-run",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        if code == 0:
            assert said in done.stdout
        else:
            assert said in done.stderr
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1

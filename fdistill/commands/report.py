"""`fdistill report`: a run, or several beside one another, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared on one page.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write; by default report.html in the folder of the first run."),
    ] = None,
    teacher_scores: Annotated[
        Path | None,
        typer.Option(
            help="What `fdistill evaluate TEACHER --output FILE` wrote: drawn as a line beside the student's."
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several.

    It has samples with a slider over training, curves with how to read them, and how to repeat the run.

    \b
    Example: fdistill report runs/digits
    Example: fdistill report runs/forward-kl runs/jensen-shannon --output compared.html
    """
    from fdistill.report.page import write_report
    from fdistill.report.run import named_runs, read_scores

    teacher = None if teacher_scores is None else read_scores(teacher_scores)
    path = output or runs[0] / "report.html"
    write_report(named_runs(runs), path, teacher)
    typer.echo(f"report: {path}")

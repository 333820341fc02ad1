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
    from fdistill.base.errors import CheckpointError
    from fdistill.base.files import read_json_object
    from fdistill.report.page import write_report
    from fdistill.report.run import named_runs

    teacher = {}
    if teacher_scores is not None:
        try:
            teacher = {name: float(value) for name, value in read_json_object(teacher_scores)["metrics"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"teacher-scores {teacher_scores}: cannot be read ({error!r}); expected the file that `fdistill "
                "evaluate TEACHER --output FILE` writes"
            ) from error
    path = output or runs[0] / "report.html"
    write_report(named_runs(runs), path, teacher)
    typer.echo(f"report: {path}")

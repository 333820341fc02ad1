"""The command push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fdistill.base.process import importing


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of a student.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where it goes on the Hugging Face hub.")],
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON file of `fdistill evaluate --output`, whose scores the card will say. May be repeated. By "
            "default the run's own (eval.every)."
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Identifier of the licence, as apache-2.0; by default the teacher's own, if it says one."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Whether everybody may see a new repository.")
    ] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload a student with fdistill",
    revision: Annotated[str | None, typer.Option(help="Branch to push to; the main one by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which files would go there, and their sizes; upload nothing.")
    ] = False,
) -> None:
    """Upload a student to the Hugging Face hub.

    Its model card gets the teacher's licence, scores and pictures.

    \b
    Example: fdistill push runs/digits me/one-step-digits --dry-run
    Example: fdistill push runs/sd15 me/sd15-one-step --scores scores.json --license creativeml-openrail-m --public
    """
    with importing():
        from fdistill.sharing.publication import prepare

    found = prepare(run, repository, scores or [], license)
    sizes = found.sizes()
    for name, size in sizes.items():
        typer.echo(f"{size:>15,}  {name}")
    typer.echo(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")
    typer.echo(f"licence: {found.licence} ({found.licence.source})")
    typer.echo(f"base model: {', '.join(found.base_models) or 'none on the hub'}")
    typer.echo(f"scores in the card: {', '.join(score.name for score in found.scores) or 'none; see --scores'}")
    for note in found.notes:
        typer.echo(note)
    seen = "everybody can see it" if public else "only you can see it"
    if dry_run:
        typer.echo(f"would be pushed to {repository}; of a new repository {seen}")
        return
    from fdistill.sharing.upload import upload

    typer.echo(f"pushed: {upload(repository, found.files, public=public, message=message, revision=revision)}")
    typer.echo(f"load it with fdistill generate {repository}, or fdistill.load_student({repository!r})")

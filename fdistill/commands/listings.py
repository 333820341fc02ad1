"""`fdistill configs`, `methods` and `divergences`: what there is to choose from. Only the last imports torch."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

#: What `fdistill` alone prints.
START = """\
fdistill distils a pretrained diffusion checkpoint into a generator of one step, or of a few.

Try it, without a download and without a GPU, in about three minutes:
    fdistill distill digits --output runs/digits
    fdistill generate runs/digits --num-images 100 --output images
    fdistill evaluate runs/digits

Distil a checkpoint of your own:
    fdistill inspect CHECKPOINT                  # is it read rightly?
    fdistill init                                # five questions; writes a config with its reasons
    fdistill configs                             # presets: what they need, cost and reach
    fdistill distill CONFIG --smoke --output runs/try    # on a tiny network, in a minute
    fdistill distill CONFIG teacher=CHECKPOINT --dry-run --output runs/mine
    fdistill distill CONFIG teacher=CHECKPOINT --output runs/mine

Measure images, of whatever model:
    fdistill protocols
    fdistill evaluate FOLDER_OR_CHECKPOINT --protocol PROTOCOL

All commands: fdistill --help. All options of one: fdistill distill --help.
Completion by the Tab key: fdistill --install-completion.
"""
_WIDEST = 100
#: The last sentence of "Reach" in the header of a preset that is written after published runs.
_NOT_RUN = "This recipe has not been run here yet."


def configs() -> None:
    """List the presets of `fdistill distill`.

    Of each: what it trains on, what it needs and costs, and what it reached here or elsewhere.

    \b
    Example: fdistill configs
    """
    from fdistill.config.reading import embedded_configs

    found = embedded_configs()
    for path in found:
        header = _header(path)
        reach = " ".join(header["Reach"].split())
        tried = reach.removesuffix(_NOT_RUN)
        facts = [("trains on", _trains_on(path, header)), ("needs", _sentence(header["Hardware"]))]
        if "Hours" in header:
            facts.append(("hours", _sentence(header["Hours"])))
        facts += [("reached", reach)] if tried == reach else [("published", tried.strip()), ("run here", "not yet")]
        show(path.stem, _sentence(header[""]), facts)
    typer.echo(f"{len(found)} presets; start one with fdistill distill NAME --output FOLDER")
    typer.echo("What GPUs need is counted, not measured; fdistill plan NAME counts it for yours.")


def methods() -> None:
    """List the methods: the values of the setting `method`.

    \b
    Example: fdistill methods
    """
    from fdistill.methods import METHODS

    for name, method in METHODS.items():
        facts = []
        if method.divergence is not None:
            facts.append(("divergence", f"any of fdistill divergences; {method.divergence} by default"))
        images = "the data's, or the teacher's own (data=teacher-samples)" if method.discriminator else "none needed"
        facts.append(("images", f"{images}; draws pairs with the teacher" if method.pairs else images))
        facts.append(("about it", f"docs/methods/{name}.md"))
        show(name, method.summary, facts)
    typer.echo("choose one with method=NAME, as in fdistill distill digits method=sid --output FOLDER")


def divergences() -> None:
    """List the f-divergences: the values of `divergence`.

    Each with h(r), its weight of the score difference.

    \b
    Example: fdistill divergences
    """
    from fdistill.divergence import ALIASES, DIVERGENCES

    for divergence in DIVERGENCES.values():
        short = ", ".join(alias for alias, name in ALIASES.items() if name == divergence.name)
        show(divergence.name, f"h(r) = {_weight(divergence.powers)}", [("in short", short)])
    show("alpha(a)", "h(r) = r^a, for any number a", [])
    show("module:function", "f of your own, convex with f(1) = 0; h(r) = r^2 f''(r)", [])
    typer.echo("r is p_teacher / p_student; choose one with divergence=NAME")


def _weight(powers: tuple[float, float, float] | None) -> str:
    """c r^a (1 + r)^b as people write it."""
    assert powers is not None
    scale, power, other = powers
    parts = [f"{scale:g}"] if scale != 1 else []
    for base, exponent in (("r", power), ("(1 + r)", other)):
        if exponent:
            parts.append(base if exponent == 1 else f"{base}^{exponent:g}")
    return " ".join(parts) or "1"


def _header(path: Path) -> dict[str, str]:
    """The comment at the top of a config: {"Reach": text, ...}, and what stands before the first of these under ""."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    first, *rest = re.split(r"^ ([A-Z][a-z]+): ", "\n".join(lines), flags=re.MULTILINE)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def _trains_on(path: Path, header: dict[str, str]) -> str:
    """What a config asks for beside the teacher."""
    settings = dict(re.findall(r"^(data|prompts): (.*)", path.read_text(encoding="utf-8"), re.MULTILINE))
    data = settings["data"]
    if "prompts" in settings:
        return f"prompts, one a line in {settings['prompts']}"
    if data == "null":
        return "the teacher's own pairs of noise and sample"
    captioned = "captioned images" if "captioned" in header.get("Data", "") else "images"
    if data.endswith("latents"):
        return f"{captioned}, encoded once to latents"
    return f"images: {data}" if "/" in data else f"the embedded {data}"


def _sentence(text: str) -> str:
    """The first sentence, on one line."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(text.split()))[0]


def show(name: str, text: str, facts: Sequence[tuple[str, str]]) -> None:
    """A name, a text, and named facts below it, wrapped to the terminal."""
    typer.secho(name, bold=True)
    for line in _wrapped(text, ""):
        typer.echo(line)
    for key, value in facts:
        for line in _wrapped(value, key):
            typer.echo(line)


def _wrapped(text: str, key: str) -> Iterator[str]:
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    first = f"    {key:<12}" if key else "    "
    yield from textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first))

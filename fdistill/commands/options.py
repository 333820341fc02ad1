"""Options that several commands have, and how their texts are read."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fdistill.base.errors import ArgumentError

Guidance = Annotated[
    float | None,
    typer.Option(
        help="Of a teacher that knows a label for `no class`, or is told prompts; 1, the default, is off. With "
        "--sampler pipeline, what the pipeline is called with: 0 and 1 are off, but LCM and FLUX.1-dev are told it."
    ),
]
Network = Annotated[str | None, typer.Option(help="module:function of a student of your own network.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Resolution = Annotated[int | None, typer.Option(help="Of a text-to-image teacher, where it is not its own.")]
Protocol = Annotated[str, typer.Option(help="How to measure; its name is written beside the scores.")]
Metrics = Annotated[str | None, typer.Option(help="Some of the protocol's, as fid,recall.")]
Weights = Annotated[
    list[str] | None,
    typer.Option(help="Published weights: NETWORK=FILE, or a folder of files under their published names; repeat."),
]
BatchSize = Annotated[int, typer.Option(help="Images at a time; features vary in their last bits with it.")]
NegativePrompt = Annotated[str, typer.Option(help="What a guided text-to-image teacher leads away from.")]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Heun steps of a teacher: 2 x steps - 1 evaluations an image; or steps of a pipeline's scheduler. 18 by "
        "default; a student has its own.",
    ),
]
Sampler = Annotated[
    str,
    typer.Option(
        help="heun; or pipeline: any pipeline of diffusers (LCM, SD-Turbo, ...) with its own scheduler, or a student "
        "of fdistill as other programs call it."
    ),
]


def whole_numbers(name: str, text: str) -> list[int]:
    """0,1,2 as [0, 1, 2]; raises ArgumentError that names the option."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"{name}: got {text!r}, expected whole numbers and commas, as in 0,1,2") from error


def is_main_process() -> bool:
    """Whether this is the one process that speaks."""
    return os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate number them

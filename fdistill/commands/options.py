"""Options that several commands share, and how their texts are read. Imports no torch."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fdistill.base.errors import ArgumentError, ConfigError

Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Sampler steps of a teacher or pipeline, 18 by default. Heun's method takes 2 x steps - 1 network "
        "evaluations for each image. A student takes the steps it was trained for, or so many.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale of a teacher that takes prompts or has a label for `no class`; 1 by default, which is no "
        "guidance. With --sampler pipeline the pipeline is called with this number: for most, 0 and 1 both mean no "
        "guidance, but LCM, FLUX.1-dev and FLUX.2-dev take it as an input of the network."
    ),
]
GuidanceTeacher = Annotated[
    str | None,
    typer.Option(
        help="A second network that a teacher's guidance leads away from, such as one without classes or a weaker one; "
        "by default the teacher without its class or prompt."
    ),
]
NegativePrompt = Annotated[
    str,
    typer.Option(help="What the guidance of a text-to-image teacher steers away from; nothing by default."),
]
Recipe = Annotated[
    str, typer.Option(help="How images are cropped and resized: exact, center-box, center-lanczos, adm or squash.")
]
Resolution = Annotated[
    int | None,
    typer.Option(help="Side of a text-to-image teacher's images in pixels; by default the teacher's own."),
]
Network = Annotated[
    str | None,
    typer.Option(help="module:function that builds the network, for a student whose network is your own code."),
]
Sampler = Annotated[
    str,
    typer.Option(
        help="heun: fdistill's own samplers. pipeline: run the checkpoint as the diffusers pipeline that it is (LCM, "
        "SD-Turbo, ...) with its own scheduler, or a student of fdistill as other programs run it."
    ),
]
AllowSkipped = Annotated[
    bool,
    typer.Option(
        "--allow-skipped",
        help="Measure images of which more than 1 % cannot be read (linked folders, formats that are not read); "
        "without it they are refused.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Protocol = Annotated[
    str,
    typer.Option(
        help="What is measured, on how many samples, prepared how, against what: digits, digits-t2i, digit-pairs, "
        "cifar10-fid50k, "
        "imagenet64-fid50k, imagenet64-edm2, imagenet256-adm, imagenet512-edm2, coco30k-dmd2, coco10k-sdxl, "
        "few-step-t2i or folder."
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(help="Metrics of the protocol, separated by commas, as in fid,recall; by default its default ones."),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        help="Published weights of feature networks: NETWORK=FILE, or a folder of files under their published names. "
        "May be repeated. By default they are looked for in caches, then downloaded."
    ),
]
BatchSize = Annotated[
    int, typer.Option(help="Images at a time. The last bits of features, and so of scores, depend on it.")
]


def whole_numbers(name: str, text: str) -> list[int]:
    """Reads "0,1,2" as [0, 1, 2]. Raises ArgumentError that names the option."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"{name}: got {text!r}, expected whole numbers and commas, as in 0,1,2") from error


def number_or_auto(name: str, text: str) -> int | None:
    """Reads "8" as 8 and "auto" as None. Raises ArgumentError that names the option."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ArgumentError(f"{name}: got {text!r}, expected a whole number, or auto") from error


def width_and_height(name: str, text: str) -> tuple[int, int]:
    """Reads "1344x768" as (1344, 768). Raises ArgumentError that names the option."""
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError as error:
        raise ArgumentError(f"{name}: got {text!r}, expected width x height in pixels, as in 1344x768") from error
    return width, height


def is_main_process() -> bool:
    """Whether this process is the one that prints; with torchrun or accelerate there are several."""
    return os.environ.get("RANK", "0") == "0"


def config_and_settings(arguments: list[str] | None) -> tuple[str, list[str]]:
    """The name or path of the config among a command's arguments, "digits" by default, and its settings.

    Raises:
        ConfigError: there are two names.
    """
    names = [argument for argument in arguments or [] if "=" not in argument]
    overrides = [argument for argument in arguments or [] if "=" in argument]
    if len(names) > 1:
        raise ConfigError(f"expected one CONFIG and key=value settings, got {' '.join(names)}")
    return names[0] if names else "digits", overrides

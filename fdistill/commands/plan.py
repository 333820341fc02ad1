"""`fdistill plan`. Imports no torch before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fdistill.commands.options import config_and_settings


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="Name of an embedded config or path of a YAML file (default: digits), followed by settings.",
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs the run has.", min=1)] = 1,
    memory: Annotated[
        float | None,
        typer.Option(help="GB (10^9 bytes) that the run may take on each; says which settings make it fit.", min=0),
    ] = None,
    gpus_per_machine: Annotated[int, typer.Option(help="How many GPUs a machine has.", min=1)] = 8,
    tflops: Annotated[
        float | None,
        typer.Option(help="TFLOP/s that a GPU reaches; by default 150 with precision=bf16 and 75 with fp32.", min=1e-6),
    ] = None,
    link: Annotated[
        float, typer.Option(help="GB/s that a GPU sends within a machine; NVLink 4 of an H100 has 450.", min=1e-6)
    ] = 450.0,
    network: Annotated[
        float, typer.Option(help="GB/s that a GPU sends to other machines; InfiniBand NDR has 50.", min=1e-6)
    ] = 50.0,
    seconds_per_iteration: Annotated[
        float | None,
        typer.Option(
            help="Measured on one GPU, with as many samples as each of --gpus has; replaces --tflops.",
            min=1e-9,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
    output: Annotated[Path | None, typer.Option(help="A file for the same JSON.")] = None,
) -> None:
    """Predict memory, disk and time of a run.

    It also says which settings make a run fit. Nothing is trained: one iteration is counted on tensors without values,
    and of a hub id only config files are downloaded.

    \b
    Example: fdistill plan sd15 --gpus 8 --memory 80
    Example: fdistill plan sdxl gradient_checkpointing=true --gpus 64 --seconds-per-iteration 3.1
    """
    name, overrides = config_and_settings(arguments)

    from fdistill.commands import plan_text
    from fdistill.config.reading import load_config
    from fdistill.planning.plan import Hardware, make_plan
    from fdistill.planning.rates import Rates

    config = load_config(name, overrides)
    if tflops is None:
        tflops = 150.0 if config.precision == "bf16" else 75.0
    limit = None if memory is None else int(memory * 1e9)
    hardware = Hardware(gpus, gpus_per_machine, limit, Rates(tflops, link, network, seconds_per_iteration))
    made = make_plan(config, hardware, lambda text: typer.echo(text, err=True))
    if output is not None:
        plan_text.write(made, output)
    typer.echo(plan_text.as_json(made).rstrip() if as_json else plan_text.as_text(made))

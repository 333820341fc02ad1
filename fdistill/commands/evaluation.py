"""The commands that measure: evaluate, compare, reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fdistill.commands.options import (
    BatchSize,
    Device,
    Guidance,
    Metrics,
    NegativePrompt,
    Network,
    Protocol,
    Resolution,
    Sampler,
    Steps,
    Weights,
    is_main_process,
    whole_numbers,
)


def evaluate(
    samples: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLES",
            help="Images (a folder, zip or npz), or what makes them: a student, run, teacher or diffusers pipeline.",
        ),
    ],
    reference: Annotated[
        str | None, typer.Option(help="Images, or statistics: .npz, EDM2's .pkl, torch-fidelity's .pt.")
    ] = None,
    protocol: Protocol = "digits",
    metrics: Metrics = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file for scores and provenance.")] = None,
    seeds: Annotated[str, typer.Option(help="Of generated samples; of several, as 0,1,2, mean and deviation.")] = "0",
    num_images: Annotated[int | None, typer.Option(help="Not the protocol's; it shows in scores' names.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of them, where the protocol has none.")] = None,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    sampler: Sampler = "heun",
    steps: Steps = None,
    guidance_scale: Guidance = None,
    negative_prompt: NegativePrompt = "",
    resolution: Resolution = None,
    replicates: Annotated[int, typer.Option(help="Of the bootstrap behind the spread of distances; 0: none.")] = 20,
    classifier: Annotated[
        str | None, typer.Option(help="module:function of a network from images in [-1, 1] to logits.")
    ] = None,
    network: Network = None,
    device: Device = "auto",
) -> None:
    """Score generated images by a named protocol.

    \b
    Example: fdistill evaluate runs/digits --output scores.json
    Example: fdistill evaluate runs/cifar10 --protocol cifar10-fid50k --reference cifar10-32x32.npz --seeds 0,1,2
    Example: fdistill evaluate lcm --sampler pipeline --steps 4 --protocol folder --reference photos --num-images 5000
    """
    from evaluation.evaluate import describe
    from evaluation.evaluate import evaluate as run
    from evaluation.weights import parse_weights

    result = run(
        samples,
        reference=reference,
        protocol=protocol,
        metrics=None if metrics is None else metrics.split(","),
        output=output,
        seeds=whole_numbers("seeds", seeds),
        num_images=num_images,
        prompts=prompts,
        weights=parse_weights(weights or []),
        batch_size=batch_size,
        sampler=sampler,
        num_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        resolution=resolution,
        replicates=replicates,
        classifier=classifier,
        network=network,
        device=device,
    )
    if is_main_process():
        typer.echo(describe(result))


def compare(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="A B ...", help="Results (.json) of evaluate, or anything that evaluate takes."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="A folder for comparison.md, .json and .png; must not exist or be empty."),
    ] = None,
    names: Annotated[str | None, typer.Option(help="Of the rows, as ours,teacher; short ones by default.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Columns, as fid,recall; the first is drawn.")] = None,
    protocol: Annotated[str | None, typer.Option(help="By default that of the results, or digits.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Of what is still to be measured; as are the next ones.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Not the protocol's.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of them, where the protocol has none.")] = None,
    weights: Weights = None,
    seeds: Annotated[str | None, typer.Option(help="As 0,1,2, of what makes images.")] = None,
    sampler: Annotated[str | None, typer.Option(help="heun or pipeline; of what makes images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of teachers and pipelines.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
) -> None:
    """Put results side by side: one table, and a figure of quality against evaluations and seconds an image.

    \b
    Example: fdistill compare student.json teacher.json runs/digits --output comparison
    """
    from evaluation.compare import compare as run
    from evaluation.comparison.table import text_table
    from evaluation.weights import parse_weights

    options: dict[str, Any] = {
        "reference": reference,
        "num_images": num_images,
        "prompts": prompts,
        "weights": parse_weights(weights) if weights else None,
        "seeds": None if seeds is None else whole_numbers("seeds", seeds),
        "sampler": sampler,
        "num_steps": steps,
        "device": device,
    }
    comparison = run(
        inputs,
        output=output,
        names=None if names is None else names.split(","),
        metrics=None if metrics is None else metrics.split(","),
        protocol=protocol,
        **{name: value for name, value in options.items() if value is not None},
    )
    if is_main_process():
        typer.echo(text_table(comparison))


def reference(
    data: Annotated[str, typer.Argument(help="Images: a folder, an archive, an embedded data set.")],
    output: Annotated[Path, typer.Option(help="An .npz file.")],
    protocol: Protocol = "digits",
    metrics: Metrics = None,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
) -> None:
    """Make a file of statistics to evaluate against, prepared as a protocol prepares its reference.

    \b
    Example: fdistill reference data/cifar10.zip --protocol cifar10-fid50k --output cifar10.npz
    """
    from evaluation.make_reference import make_reference
    from evaluation.weights import parse_weights

    path = make_reference(
        data,
        output=output,
        protocol=protocol,
        metrics=None if metrics is None else metrics.split(","),
        weights=parse_weights(weights or []),
        batch_size=batch_size,
        device=device,
    )
    if is_main_process():
        typer.echo(f"reference: {path}")

"""The commands evaluate, compare and reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fdistill.base.process import importing
from fdistill.commands.listings import show
from fdistill.commands.options import (
    AllowSkipped,
    BatchSize,
    Device,
    Guidance,
    GuidanceTeacher,
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

Samples = Annotated[
    str,
    typer.Argument(
        metavar="SAMPLES",
        help="Images in a file or folder, as data= of distill takes them, or a student, run folder, teacher or "
        "diffusers pipeline that makes them, by its folder or hub id.",
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Images to compare the samples with, or statistics of them (.npz, EDM2's .pkl, torch-fidelity's .pt); by "
        "default the protocol's embedded reference, if it has one."
    ),
]
NumImages = Annotated[
    int | None, typer.Option(help="Number of samples; by default the protocol's. Names of scores show another number.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="File with one prompt in each line: those of finished images, or to generate images of by a protocol that "
        "has no prompts of its own. A .jsonl file may name the image of each line (file_name)."
    ),
]
ScoresFile = Annotated[
    Path | None, typer.Option(help="JSON file to write scores and provenance to; by default scores are only printed.")
]
Seeds = Annotated[
    str,
    typer.Option(
        help="Seeds of generated samples. With several, as in 0,1,2, each score is the mean over them, and its spread "
        "their standard deviation."
    ),
]
Replicates = Annotated[
    int, typer.Option(help="Bootstrap replicates behind the spread of Frechet distances; 0 for no spread.")
]
Classifier = Annotated[
    str | None,
    typer.Option(
        help="module:function that returns a torch module from images in [-1, 1] to logits, for class_accuracy in a "
        "protocol without a classifier."
    ),
]

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="A B ...",
        help="Two or more JSON files that evaluate wrote, or anything that evaluate takes, which is measured first.",
    ),
]
ComparisonFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for comparison.md, comparison.json and comparison.png; must be empty or not exist. By default the "
        "table is only printed."
    ),
]
Names = Annotated[
    str | None,
    typer.Option(help="Names of the rows, as in ours,teacher; by default the parts of the paths that differ."),
]
Columns = Annotated[
    str | None,
    typer.Option(help="Columns of the table, as in fid,recall, of which the first is drawn; by default all."),
]
CommonProtocol = Annotated[
    str | None,
    typer.Option(help="Protocol of all results; by default that of the JSON files, or digits if there are none."),
]
SeedsIfGiven = Annotated[str | None, typer.Option(help="Seeds of generated samples, as in 0,1,2; 0 by default.")]
SamplerIfGiven = Annotated[
    str | None, typer.Option(help="How checkpoints are sampled: heun (the default) or pipeline, as for evaluate.")
]
StepsIfGiven = Annotated[
    int | None, typer.Option("--steps", help="Sampler steps of teachers and pipelines; 18 by default.")
]
DeviceIfGiven = Annotated[str | None, typer.Option(help="auto (the default), cpu, cuda or mps.")]

StatisticsFile = Annotated[Path, typer.Option(help="The .npz file to write.")]
MetricsToServe = Annotated[
    str | None,
    typer.Option(
        help="Metrics to compute from the file, as in fid,recall. By default those of the protocol's default "
        "metrics that need only mean and covariance; others, such as recall, make the file large."
    ),
]


def evaluate(
    samples: Samples,
    reference: Reference = None,
    protocol: Protocol = "digits",
    metrics: Metrics = None,
    output: ScoresFile = None,
    seeds: Seeds = "0",
    num_images: NumImages = None,
    prompts: Prompts = None,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    sampler: Sampler = "heun",
    steps: Steps = None,
    guidance_scale: Guidance = None,
    guidance_teacher: GuidanceTeacher = None,
    negative_prompt: NegativePrompt = "",
    resolution: Resolution = None,
    replicates: Replicates = 20,
    classifier: Classifier = None,
    network: Network = None,
    allow_skipped: AllowSkipped = False,
    device: Device = "auto",
) -> None:
    """Score images, or what generates them, by a named protocol.

    \b
    Example: fdistill evaluate runs/digits --output scores.json
    Example: fdistill evaluate runs/cifar10 --protocol cifar10-fid50k --reference cifar10-32x32.npz --seeds 0,1,2
    Example: fdistill evaluate lcm --sampler pipeline --steps 4 --protocol folder --reference photos --num-images 5000
    """
    with importing():
        from evaluation.evaluate import describe
        from evaluation.evaluate import evaluate as run
        from evaluation.weights import parse_weights

    run(
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
        guidance_teacher=guidance_teacher,
        negative_prompt=negative_prompt,
        resolution=resolution,
        replicates=replicates,
        classifier=classifier,
        network=network,
        allow_skipped=allow_skipped,
        shown=lambda result: typer.echo(describe(result)),
        device=device,
    )


def compare(
    inputs: Inputs,
    output: ComparisonFolder = None,
    names: Names = None,
    metrics: Columns = None,
    protocol: CommonProtocol = None,
    reference: Reference = None,
    num_images: NumImages = None,
    prompts: Prompts = None,
    weights: Weights = None,
    seeds: SeedsIfGiven = None,
    sampler: SamplerIfGiven = None,
    steps: StepsIfGiven = None,
    allow_skipped: AllowSkipped = False,
    device: DeviceIfGiven = None,
) -> None:
    """Compare several results in one table and one figure.

    The figure draws quality over network evaluations and over seconds for each image. Options from --reference on are
    for inputs that must be measured first; JSON files of evaluate need none of them.

    \b
    Example: fdistill compare student.json teacher.json runs/digits --output comparison
    """
    with importing():
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
        "allow_skipped": True if allow_skipped else None,
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
    data: Annotated[str, typer.Argument(help="Images: anything that distill takes as data=.")],
    output: StatisticsFile,
    protocol: Protocol = "digits",
    metrics: MetricsToServe = None,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    allow_skipped: AllowSkipped = False,
    device: Device = "auto",
) -> None:
    """Make a statistics file that stands for a reference.

    `fdistill evaluate` takes it as --reference in place of the images.

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
        allow_skipped=allow_skipped,
        device=device,
    )
    if is_main_process():
        typer.echo(f"reference: {path}")


def protocols() -> None:
    """List the protocols of `fdistill evaluate`.

    Of each: how many samples it takes, what they are compared with, its scores, and what it needs.

    \b
    Example: fdistill protocols
    """
    from evaluation.protocols import PROTOCOLS

    for name, protocol in PROTOCOLS.items():
        count = "any number of" if protocol.num_samples is None else f"{protocol.num_samples:,}"
        facts = [("against", protocol.reference), ("scores", ", ".join(protocol.default))]
        if protocol.embedded is None:
            facts.append(("needs", "--reference, and weights of feature networks: --weights, or they are downloaded"))
        show(name, f"{count} samples", facts)
    typer.echo("choose one with fdistill evaluate CHECKPOINT --protocol NAME")

"""The `fdistill` command."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from fdistill import __version__
from fdistill.base.files import nothing_cached
from fdistill.base.process import importing
from fdistill.commands.cache import cache
from fdistill.commands.demo import demo
from fdistill.commands.ending import one_message, quiet_libraries
from fdistill.commands.evaluation import compare, evaluate, protocols, reference
from fdistill.commands.init.command import init
from fdistill.commands.listings import START, configs, divergences, methods
from fdistill.commands.options import (
    Device,
    Guidance,
    GuidanceTeacher,
    NegativePrompt,
    Network,
    Recipe,
    Resolution,
    Sampler,
    Steps,
    config_and_settings,
    is_main_process,
    number_or_auto,
    whole_numbers,
    width_and_height,
)
from fdistill.commands.plan import plan
from fdistill.commands.push import push
from fdistill.commands.report import report

app = typer.Typer(
    name="fdistill",
    help="Distil pretrained diffusion checkpoints into one-step generators.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fdistill {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(START, nl=False)


@app.command()
def distill(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="The run folder; must be empty or not exist, unless --resume is given.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="Name of an embedded config or path of a YAML file (default: digits), followed by settings.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the run folder, if there is one.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved config and what a run would do, encode and draw; write nothing."
        ),
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Try a recipe out: a few iterations of a tiny network on random images. A teacher= given as well is "
            "tried in place of the tiny one.",
        ),
    ] = False,
) -> None:
    """Distil a teacher into a student of one step, or of a few.

    CONFIG is a preset (`fdistill configs`) or a YAML file; KEY=VALUE changes one of its settings, for this run alone.
    docs/api/settings.md has all settings, and --dry-run shows those of the run.

    \b
    Example: fdistill distill digits divergence=forward-kl generator.lr=1e-4 --output runs/forward-kl
    """
    name, overrides = config_and_settings(arguments)
    if dry_run:
        context.with_resource(nothing_cached())
    if smoke:
        from fdistill.commands.smoke import smoke_config

        config = smoke_config(name, overrides)
    else:
        from fdistill.config.reading import load_config

        config = load_config(name, overrides)

    if dry_run:
        from fdistill.commands.dry_run import describe
        from fdistill.training.run_folder import check_output

        check_output(output, config, resume)
        typer.echo(describe(config))
        return
    with importing():
        from fdistill.training.loop import distill as run

    student = run(config, output=output, resume=resume)
    if is_main_process():
        typer.echo(f"student: {student}")


@app.command()
def generate(
    student: Annotated[
        str,
        typer.Argument(
            help="A student (its folder, run folder or hub id), or a teacher (an embedded name, a folder or hub id)."
        ),
    ],
    num_images: Annotated[int, typer.Option(help="Number of images.")],
    output: Annotated[
        Path, typer.Option(help="Folder for 000000.png, 000001.png, ... and manifest.json; must be empty or not exist.")
    ],
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) and its class or prompt alone.")] = 0,
    batch_size: Annotated[
        str, typer.Option(help="Images in one network evaluation of each process; auto tries which is fastest.")
    ] = "256",
    class_labels: Annotated[
        str | None, typer.Option(help="Classes to draw in turn, as in 0,1,2; by default all classes.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt for a text-to-image model. May be repeated; several are drawn in turn."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt in each line, drawn in turn, after those of --prompt.")
    ] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    guidance_teacher: GuidanceTeacher = None,
    negative_prompt: NegativePrompt = "",
    resolution: Resolution = None,
    size: Annotated[
        str | None,
        typer.Option(help="Width x height of a text-to-image model's images in pixels, as in 1344x768."),
    ] = None,
    network: Network = None,
    sampler: Sampler = "heun",
    precision: Annotated[str, typer.Option(help="fp32, or bf16: networks compute in bfloat16.")] = "fp32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the networks: a minute or more at first, for many images.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Draw images with a student, a teacher or a diffusers pipeline.

    \b
    Example: fdistill generate runs/digits --num-images 100 --seed 0 --class-labels 3,7 --output images
    Example: fdistill generate runs/t2i --num-images 8 --prompt "a bold seven" --output images
    Example: fdistill generate stabilityai/sd-turbo --sampler pipeline --steps 1 --num-images 9 --prompt a --output out
    """
    labels = None if class_labels is None else whole_numbers("class-labels", class_labels)
    batch = number_or_auto("batch-size", batch_size)
    sides = None if size is None else width_and_height("size", size)

    with importing():
        from fdistill.data.prompts import read_prompts
        from fdistill.generation.generate import generate as run

    listed = [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])]
    folder = run(
        student,
        num_images=num_images,
        output=output,
        seed=seed,
        batch_size=batch,
        class_labels=labels,
        prompts=listed or None,
        num_steps=steps,
        guidance_scale=guidance_scale,
        guidance_teacher=guidance_teacher,
        negative_prompt=negative_prompt,
        resolution=resolution,
        size=None if sides is None else (sides[1], sides[0]),
        network=network,
        sampler=sampler,
        precision=precision,
        compiled=compiled,
        device=device,
    )
    if is_main_process():
        typer.echo(f"images: {folder}")


app.command()(init)
app.command()(demo)
app.command()(plan)
app.command()(evaluate)
app.command()(compare)
app.command()(reference)
app.command()(report)
app.command()(cache)
app.command()(push)
for listing in (configs, methods, divergences, protocols):
    app.command()(listing)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A published .pkl, .pt, .pth, .bin or .safetensors file.")],
    output: Annotated[Path, typer.Option(help="Folder for the result; must be empty or not exist.")],
    student_level: Annotated[
        str | None,
        typer.Option(
            help="Noise level from which a student starts, as 80 or 999,749,499,249; none for a teacher. Needed where "
            "a file may be either."
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(help="A checkpoint of the same architecture, for a file that does not say its own."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="For a text-to-image checkpoint: folder or hub id of the pipeline that it was trained from."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Which network of a file that holds several, as net or ema_9999.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Family of a DiT or SiT state dict, dit or sit; needed for these files only.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of a DiT or SiT that was not trained on ImageNet's 1,000.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads of a DiT or SiT of another width than the published ones.")
    ] = None,
) -> None:
    """Turn a published file into a teacher or student folder.

    The file is a pickle of EDM, EDM2 or SiD, a state dict (DiT, SiT, FastGen, DMD2), or a single-file text-to-image
    checkpoint. No code in it is run. The folder holds safetensors.

    \b
    Example: fdistill convert edm-cifar10-32x32-cond-vp.pkl --output teachers/cifar10-cond
    Example: fdistill convert mine.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5 --output teachers/mine
    Example: fdistill convert 0600000.pth --like teachers/cifar10-cond --student-level 80 --output students/fastgen
    """
    from fdistill.students.convert import convert_any
    from fdistill.teachers.convert import Elsewhere
    from fdistill.teachers.convert_dit import Given

    known = Elsewhere(like, base, weights)
    kind, folder = convert_any(source, output, student_level, family, given=Given(num_classes, heads), elsewhere=known)
    typer.echo(f"{kind}: {folder}")


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="Student folder or run folder of a text-to-image student.")],
    format: Annotated[
        str,
        typer.Option(
            help="lora (adapters as diffusers reads them), comfy (all weights as ComfyUI reads them) or comfy-lora "
            "(adapters as ComfyUI reads them)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file to write; its name ends in .safetensors.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of the weights: fp16, bf16, fp32, or fp8 for comfy; by default the student's own."
        ),
    ] = None,
) -> None:
    """Write a student as one file for diffusers or ComfyUI.

    The file has the adapters of a LoRA run, or all weights under ComfyUI's names.

    \b
    Example: fdistill export runs/sd15 --format comfy --dtype fp16 --output sd15-one-step.safetensors
    """
    from fdistill.students.export import export_student, exported_files
    from fdistill.students.folder import student_folder

    folder = student_folder(student)
    for sentence in export_student(folder, format, output, dtype):
        typer.echo(sentence)
    typer.echo(f"exported: {', '.join(str(path) for path in exported_files(folder, output))}")


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="A teacher (an embedded name, a folder or a hub id), or a student or run folder.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images like those the checkpoint was trained on (a folder, an archive, hf:name); by default the "
            "checkpoint's own samples."
        ),
    ] = None,
    recipe: Recipe = "center-box",
    vae: Annotated[
        str | None, typer.Option(help="Folder or hub id of the autoencoder, if a latent checkpoint has none.")
    ] = None,
    resolution: Resolution = None,
    device: Device = "auto",
) -> None:
    """Describe a checkpoint, and check that it is read rightly.

    It says what distill would do with the checkpoint, and whether its x0-predictions make sense. If they do not, --data
    lets it say which other reading (pixel range, scale, schedule, prediction type) is likely.

    \b
    Example: fdistill inspect digits --data digits
    """
    with importing():
        from fdistill.commands.inspect import describe
        from fdistill.commands.inspect import inspect as run

    typer.echo(describe(*run(checkpoint, data=data, recipe=recipe, vae=vae, resolution=resolution, device=device)))


@app.command()
def ema(
    run: Annotated[Path, typer.Argument(help="A run folder with snapshots of averaged weights in ema/.")],
    sigma_rel: Annotated[
        float, typer.Option(help="Width of the average relative to the number of iterations, from 0.0001 to 0.288.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the new student; must be empty or not exist.")],
    iteration: Annotated[
        int | None,
        typer.Option(help="Iteration at which the average ends, one with a snapshot; default: the last."),
    ] = None,
    network: Network = None,
    device: Device = "auto",
) -> None:
    """Make a student with another average of a run's weights.

    The average is made from the snapshots that a run with ema.snapshot_every has written.

    \b
    Example: fdistill ema runs/digits --sigma-rel 0.08 --output students/digits-0.08
    """
    from fdistill.commands.ema import reconstruct_student

    folder = reconstruct_student(
        run, sigma_rel=sigma_rel, output=output, iteration=iteration, network=network, device=device
    )
    typer.echo(f"student: {folder}")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if is_main_process():
        typer.secho(f"warning: {message}", fg="yellow", err=True)


def main() -> None:
    """Runs the command; see `one_message` for how it ends."""
    warnings.showwarning = _show_warning
    quiet_libraries()
    sys.path.append(str(Path.cwd()))  # so that module:function is also found in the current folder
    with one_message():
        app()


if __name__ == "__main__":
    main()

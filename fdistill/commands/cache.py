"""`fdistill cache`. Imports no torch before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fdistill.base.process import importing
from fdistill.commands.options import Device, Recipe, Resolution


def cache(
    data: Annotated[str, typer.Argument(help="Images: a folder, an archive, or hf:owner/name.")],
    teacher: Annotated[str, typer.Option(help="The latent teacher that will be distilled.")],
    output: Annotated[Path, typer.Option(help="A folder for the latents; must not exist, or be empty.")],
    teacher_base: Annotated[
        str | None, typer.Option(help="The pipeline of a single-file teacher, as teacher_base of the runs.")
    ] = None,
    teacher_lora: Annotated[str | None, typer.Option(help="LoRA file, as teacher_lora of the runs.")] = None,
    teacher_lora_scale: Annotated[float, typer.Option(help="Its scale, as teacher_lora_scale of the runs.")] = 1.0,
    vae: Annotated[str | None, typer.Option(help="The autoencoder, if the teacher's folder has none.")] = None,
    recipe: Recipe = "center-box",
    flip: Annotated[bool, typer.Option("--flip", help="Encode every image's mirror image as well.")] = False,
    sampling: Annotated[
        str,
        typer.Option(help="sample: training draws a latent from its distribution each time; mean: it uses the mean."),
    ] = "sample",
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that decode image files.")] = 2,
    resolution: Resolution = None,
    negative_prompt: Annotated[
        str, typer.Option(help="Negative prompt for guidance. Must equal negative_prompt of the runs.")
    ] = "",
    precision: Annotated[
        str,
        typer.Option(
            help="Precision of the text encoders: fp32 for runs with frozen_precision=fp32, bf16 for all others."
        ),
    ] = "fp32",
    buckets: Annotated[
        int,
        typer.Option(
            help="Keep images near their aspect ratio, in shapes whose sides are multiples of so many pixels, such as "
            "64; 0 crops all to squares."
        ),
    ] = 0,
    bucket_images: Annotated[
        int, typer.Option(help="The least number of images of a shape; those of a rarer one get the next shape.")
    ] = 1,
    device: Device = "auto",
) -> None:
    """Encode images to a teacher's latents, once for all runs. For a text-to-image teacher, encode captions too.

    `fdistill distill data=FOLDER` reads the result.

    \b
    Example: fdistill cache photos --teacher teachers/dit --recipe adm --flip --output latents
    """
    with importing():
        from fdistill.training.cache import cache as run

    folder = run(
        data,
        teacher=teacher,
        output=output,
        teacher_base=teacher_base,
        teacher_lora=teacher_lora,
        teacher_lora_scale=teacher_lora_scale,
        vae=vae,
        recipe=recipe,
        flip=flip,
        sampling=sampling,
        batch_size=batch_size,
        workers=workers,
        resolution=resolution,
        negative_prompt=negative_prompt,
        precision=precision,
        buckets=buckets,
        bucket_images=bucket_images,
        device=device,
    )
    typer.echo(f"latents: {folder}")

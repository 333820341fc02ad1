"""Images and captions encoded once for a latent teacher: what `data=FOLDER` then reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fdistill.base.devices import start, upload
from fdistill.base.errors import ArgumentError, ConfigError, DataError, did_you_mean
from fdistill.base.files import claimed_folder
from fdistill.base.images import to_unit
from fdistill.data import Batching, ImageLoader, Source, open_source
from fdistill.data.account import account_of, say
from fdistill.data.buckets import Bucket, Rows, sort_into_buckets
from fdistill.data.captions import distinct
from fdistill.data.embeddings import write_embeddings
from fdistill.data.latents import SAMPLING, Moments, write_latents
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.teachers.teacher import Teacher, TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import encoding_facts, open_prompt_encoder, prompt_batches

_SEED = 0


@dataclass(frozen=True)
class Encoding:
    """How images and prompts are encoded.

    Attributes:
        device: where networks compute.
        recipe: how images are brought to the teacher's size; a name in `fdistill.data.RECIPES`.
        flip: encode every image's mirror image as well.
        sampling: how training makes latents of the moments: "sample" draws from them, "mean" takes the mean.
        negative_prompt: what guidance leads away from.
        precision: of the text encoders: "fp32" for runs with frozen_precision=fp32, "bf16" for all others.
        batch_size: images per batch.
        workers: processes that decode image files.
        buckets: above 0, images keep about their aspect ratio, in buckets whose sides are multiples of so many pixels
            (`fdistill.data.buckets`); 0 makes all of them squares.
        bucket_images: the least number of images of a bucket.
    """

    device: torch.device
    recipe: str = "center-box"
    flip: bool = False
    sampling: str = "sample"
    negative_prompt: str = ""
    precision: str = "fp32"
    batch_size: int = 64
    workers: int = 2
    buckets: int = 0
    bucket_images: int = 1


def cache(
    data: str | Path,
    *,
    teacher: str | Path,
    output: str | Path,
    teacher_base: str | None = None,
    teacher_lora: str | None = None,
    teacher_lora_scale: float = 1.0,
    vae: str | None = None,
    recipe: str = "center-box",
    flip: bool = False,
    sampling: str = "sample",
    batch_size: int = 64,
    workers: int = 2,
    resolution: int | None = None,
    negative_prompt: str = "",
    precision: str = "fp32",
    buckets: int = 0,
    bucket_images: int = 1,
    device: str = "auto",
) -> Path:
    """Encodes every image of a data set to moments: mean and standard deviation of its latents. For a text-to-image
    teacher it encodes every caption as well, with the teacher's text encoders.

    Args:
        data: what `data=` takes: a folder, an archive, hf:name.
        teacher: the latent teacher. Images are encoded at its image size.
        output: a folder that is empty or does not exist.
        teacher_base, teacher_lora, teacher_lora_scale: as the run's settings of these names.
        vae: the autoencoder, if the teacher's folder has none.
        recipe: how images are brought to the teacher's size.
        flip: encode every image's mirror image as well.
        sampling: how training makes latents of the moments: "sample" draws from them, "mean" takes the mean.
        batch_size: images per batch.
        workers: processes that decode image files.
        resolution: pixels of a side of a text-to-image teacher's images; its own by default.
        negative_prompt: what guidance leads away from.
        precision: of the text encoders: "fp32" for runs with frozen_precision=fp32, "bf16" for all others.
        buckets: for text-to-image teachers: above 0, images keep about their aspect ratio, in buckets whose sides are
            multiples of so many pixels and whose areas are those of squares of `resolution`; 0 crops all to squares.
        bucket_images: images of a bucket with fewer go to the next one.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The output folder.

    Raises:
        ArgumentError, CheckpointError, DataError, OutputError: nothing is left in the output folder.
    """
    if sampling not in SAMPLING:
        raise ArgumentError(f"sampling: got {sampling!r}; {did_you_mean(sampling, SAMPLING)}")
    if bucket_images != 1 and not buckets:
        raise ArgumentError(f"bucket_images: got {bucket_images}, but without buckets nothing reads it; set buckets=64")
    if batch_size < 1 or workers < 1:
        raise ArgumentError(f"batch_size, workers: expected at least 1, got {batch_size} and {workers}")
    settings = TeacherSettings(
        str(teacher),
        base=teacher_base,
        lora=teacher_lora,
        lora_scale=teacher_lora_scale,
        vae=vae,
        resolution=resolution,
    )
    opened = open_teacher(settings)
    source = open_source(str(data))
    with claimed_folder(Path(output)) as folder:
        _, chosen = start(device)
        encoding = Encoding(
            chosen, recipe, flip, sampling, negative_prompt, precision, batch_size, workers, buckets, bucket_images
        )
        encode_data(source, opened, folder, encoding)
    return Path(output)


def encode_data(source: Source, teacher: Teacher, folder: Path, encoding: Encoding) -> None:
    """Does what `cache` does, for an open data set, a loaded teacher and a folder that is new or empty."""
    latents, resolution = teacher.latents, teacher.image_size
    if latents is None:
        raise ArgumentError(
            f"teacher {teacher.checkpoint.name!r}: makes pixels; pass the images to distill as they are"
        )
    index, write_text = None, None
    unreadable: list[str] = []
    account = account_of(source, captioned=teacher.denoiser.text_shapes is not None)
    say(f"data {source.name}", account.sentence())
    shaped = _buckets(source, teacher, encoding)
    if teacher.denoiser.text_shapes is not None:
        prompts, index = distinct_captions(source, teacher)
        write_text = partial(write_prompts, prompts=prompts, teacher=teacher, encoding=encoding)
    meta = {
        **latents.facts(),
        "sampling": encoding.sampling,
        "recipe": encoding.recipe,
        "resolution": resolution,
        "source": source.name,
        "flip": encoding.flip,
        "read": account.facts(),
        "unreadable": unreadable,
    }
    if encoding.buckets:
        # A list that is filled as they are encoded: the file that says what latents are of is written after the last.
        meta["buckets"] = []
    batches = _in_buckets(shaped, source, latents, index, encoding, unreadable, meta.get("buckets", []))
    write_latents(folder, batches, meta, source.num_classes, write_text)
    for line in unreadable:
        tqdm.write(f"skipped {line}")


def _buckets(source: Source, teacher: Teacher, encoding: Encoding) -> list[Bucket]:
    """Which images get which shape; one bucket of squares if the encoding asks for none.

    Raises:
        ArgumentError: the teacher cannot make images of these shapes.
    """
    size = teacher.image_size
    if not encoding.buckets:
        return [Bucket(size, size, list(range(len(source))))]
    denoiser, latents = teacher.denoiser, teacher.latents
    assert latents is not None
    if denoiser.text_shapes is None:
        raise ArgumentError(
            f"buckets: got {encoding.buckets}, but teacher {teacher.checkpoint.name!r} makes squares alone; expected "
            "0, or a text-to-image teacher"
        )
    if encoding.buckets % latents.factor:
        raise ArgumentError(
            f"buckets: got {encoding.buckets}; expected a multiple of {latents.factor}, the autoencoder's factor"
        )
    found = sort_into_buckets(source, size, encoding.buckets, encoding.bucket_images)
    own = denoiser.sample_shape[1:]
    try:
        for bucket in found:
            denoiser.resize(bucket.height // latents.factor, bucket.width // latents.factor)
    finally:
        denoiser.resize(*own)
    counted = (f"{bucket.width}x{bucket.height}: {len(bucket.rows):,}" for bucket in found)
    say("buckets", f"{len(found)} (width x height: images), {', '.join(counted)}")
    return found


def _in_buckets(
    buckets: Sequence[Bucket],
    source: Source,
    latents: LatentSpace,
    captions: Tensor | None,
    encoding: Encoding,
    unreadable: list[str],
    made: list[tuple[int, int, int]],
) -> Iterator[Moments]:
    """The moments of every image, one bucket after another.

    Args:
        unreadable: gets a line for each image that is left out.
        made: gets (height, width, images) of each bucket that has any.
    """
    for bucket in buckets:
        own, batching = Rows(source, bucket.rows), Batching(encoding.batch_size, _SEED)
        index = None if captions is None else captions[torch.tensor(bucket.rows)]
        shape, count = (3, bucket.height, bucket.width), 0
        with ImageLoader(
            own, shape, batching, recipe=encoding.recipe, workers=encoding.workers, whole=len(source)
        ) as loader:
            for batch in _moments(loader, batching, len(own), latents, index, encoding):
                count += len(batch[0])
                yield batch
            unreadable += [f"{name}: {reason}" for name, reason in loader.skipped]
        if count:
            made.append((bucket.height, bucket.width, count))


def distinct_captions(source: Source, teacher: Teacher) -> tuple[list[str], Tensor]:
    """(each caption of the images once; int64 [N]: which of them each image has); DataError if there are none."""
    if source.captions is None:
        raise DataError(
            f"data {source.name}: images without captions, but teacher {teacher.checkpoint.name!r} is a "
            "text-to-image model; expected photo.txt beside photo.jpg, a metadata.jsonl, or a caption column"
        )
    return distinct(source.captions)


def text_facts(teacher: Teacher, encoding: Encoding) -> dict[str, Any]:
    """What embeddings depend on besides their prompts: the META_KEYS of `fdistill.data.embeddings`.

    Raises:
        ConfigError: the teacher is a function, which has no folder with text encoders.
    """
    folder = teacher.checkpoint.folder
    if folder is None:
        raise ConfigError(
            f"teacher {teacher.checkpoint.name!r}: is a function, which has no text encoders; expected a pipeline "
            "folder"
        )
    encoder = encoding_facts(folder, teacher.image_size, encoding.precision)
    return {"encoder": encoder, "null_prompt": encoding.negative_prompt}


def write_prompts(
    folder: Path | None, prompts: Sequence[str], teacher: Teacher, encoding: Encoding, *, shared: bool = False
) -> None:
    """Encodes prompts into a folder for `EmbeddingSource`; loads the teacher's text encoders, and frees them again.

    Args:
        folder: None in a process that encodes its part and writes nothing.
        shared: whether all processes call it and encode together.
    """
    encoders = open_prompt_encoder(teacher.checkpoint, teacher.image_size, encoding.precision)
    with encoders.on(encoding.device):
        batches = prompt_batches(encoders, prompts, shared=shared)
        if folder is None:
            deque(batches, maxlen=0)
        else:
            null = encoders.null(encoding.negative_prompt)
            write_embeddings(folder, batches, null=null, meta=text_facts(teacher, encoding))


def _moments(
    loader: ImageLoader,
    batching: Batching,
    items: int,
    latents: LatentSpace,
    captions: Tensor | None,
    encoding: Encoding,
) -> Iterator[Moments]:
    """The moments of every image once, in the loader's order; those that cannot be decoded are left out."""
    order = batching.order(items)
    with tqdm(total=items, desc="encode", unit="img", mininterval=0.5) as bar:
        for number in range(-(-items // batching.batch_size)):
            batch, wanted = next(loader), order.rows(number)
            once = torch.arange(len(wanted)) < items - number * batching.batch_size
            kept = once & (batch.rows == wanted)  # the loader puts another item in the place of an unreadable one
            if not bool(kept.any()):
                continue
            images, labels = to_unit(upload(batch.images[kept], encoding.device)), batch.labels[kept]
            rest = (labels,) if captions is None else (labels, captions[batch.rows[kept]])
            yield latents.moments(images), *rest
            if encoding.flip:
                yield latents.moments(images.flip(-1)), *rest
            bar.update(len(labels))

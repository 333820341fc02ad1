"""Images encoded once by a latent teacher's autoencoder: what `data=FOLDER` then reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fdistill.base.devices import start, upload
from fdistill.base.errors import ArgumentError, DataError, did_you_mean
from fdistill.base.files import claim_folder
from fdistill.base.images import to_unit
from fdistill.data import ImageLoader, Source, open_source
from fdistill.data.captions import distinct
from fdistill.data.embeddings import write_embeddings
from fdistill.data.latents import SAMPLING, Moments, write_latents
from fdistill.data.order import EpochOrder
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.teachers.teacher import Teacher, open_teacher
from fdistill.teachers.text_encoders import encoding_facts, open_prompt_encoder, prompt_batches

_SEED = 0


def cache(
    data: str | Path,
    *,
    teacher: str | Path,
    output: str | Path,
    vae: str | None = None,
    recipe: str = "center-box",
    flip: bool = False,
    sampling: str = "sample",
    batch_size: int = 64,
    workers: int = 2,
    resolution: int | None = None,
    negative_prompt: str = "",
    precision: str = "fp32",
    device: str = "auto",
) -> Path:
    """Encodes every image of a data set to moments (mean and standard deviation of its latents), and for a
    text-to-image teacher every caption to what its denoiser is told.

    Args:
        data: what `data=` takes: a folder, an archive, hf:name.
        teacher: the latent teacher, whose sample size gives the resolution.
        output: a folder that is empty or does not exist.
        vae: autoencoder, where the teacher's folder has none.
        recipe: how images are brought to the resolution.
        flip: add every image's mirror image.
        sampling: what training takes: "sample" draws from the moments, "mean" does not.
        batch_size: images at a time.
        workers: processes that decode.
        resolution: of a text-to-image teacher, where it is not the teacher's own.
        negative_prompt: what guidance leads away from.
        precision: "fp32" or "bf16", of the text encoders: a run's frozen_precision.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The output folder.

    Raises:
        ArgumentError, CheckpointError, DataError, OutputError: before anything is written, or with nothing left behind.
    """
    if sampling not in SAMPLING:
        raise ArgumentError(f"sampling: got {sampling!r}; {did_you_mean(sampling, SAMPLING)}")
    if batch_size < 1 or workers < 1:
        raise ArgumentError(f"batch_size, workers: expected at least 1, got {batch_size} and {workers}")
    opened = open_teacher(teacher, vae=vae, resolution=resolution)
    source = open_source(str(data))
    folder = claim_folder(Path(output))
    _, chosen = start(device)
    encode_data(
        source,
        opened,
        folder,
        device=chosen,
        recipe=recipe,
        flip=flip,
        sampling=sampling,
        negative_prompt=negative_prompt,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
    )
    return Path(output)


def encode_data(
    source: Source,
    teacher: Teacher,
    folder: Path,
    *,
    device: torch.device,
    recipe: str = "center-box",
    flip: bool = False,
    sampling: str = "sample",
    negative_prompt: str = "",
    precision: str = "fp32",
    batch_size: int = 64,
    workers: int = 2,
) -> None:
    """`cache` of an open source for a loaded teacher, into a folder that is made or replaced."""
    latents, checkpoint = teacher.latents, teacher.checkpoint
    if latents is None:
        raise ArgumentError(f"teacher {checkpoint.name!r}: makes pixels; pass the images to distill as they are")
    resolution = teacher.image_size
    index, write_text = None, None
    if teacher.denoiser.text_shapes is not None:
        if source.captions is None:
            raise DataError(
                f"data {source.name}: images without captions, but teacher {checkpoint.name!r} is told prompts; "
                "expected photo.txt beside photo.jpg, a metadata.jsonl, or a caption column"
            )
        assert checkpoint.folder is not None
        prompts, index = distinct(source.captions)
        encoders = open_prompt_encoder(checkpoint, resolution, precision)
        described = {
            "encoder": encoding_facts(checkpoint.folder, resolution, precision),
            "null_prompt": negative_prompt,
        }

        def write_text(path: Path) -> None:
            with encoders.on(device):
                null = encoders.null(negative_prompt)
                write_embeddings(path, prompt_batches(encoders, prompts), null=null, meta=described)

    meta = {
        **latents.facts(),
        "sampling": sampling,
        "recipe": recipe,
        "resolution": resolution,
        "source": source.name,
        "flip": flip,
    }
    with ImageLoader(
        source, (3, resolution, resolution), recipe=recipe, batch_size=batch_size, seed=_SEED, workers=workers
    ) as loader:
        batches = _moments(loader, source, latents, index, batch_size, flip, device)
        write_latents(folder, batches, meta, source.num_classes, write_text)
        for name, reason in loader.skipped:
            tqdm.write(f"skipped {name}: {reason}")


def _moments(
    loader: ImageLoader,
    source: Source,
    latents: LatentSpace,
    captions: Tensor | None,
    batch_size: int,
    flip: bool,
    device: torch.device,
) -> Iterator[Moments]:
    """Every item once, in the loader's order; without those that cannot be decoded."""
    order, items = EpochOrder(len(source), batch_size, _SEED), len(source)
    with tqdm(total=items, desc="encode", unit="img", mininterval=0.5) as bar:
        for number in range(-(-items // batch_size)):
            batch, wanted = next(loader), order.rows(number)
            once = torch.arange(len(wanted)) < items - number * batch_size
            kept = once & (batch.rows == wanted)  # the loader puts another item in the place of an unreadable one
            if not bool(kept.any()):
                continue
            images, labels = to_unit(upload(batch.images[kept], device)), batch.labels[kept]
            rest = (labels,) if captions is None else (labels, captions[batch.rows[kept]])
            yield latents.moments(images), *rest
            if flip:
                yield latents.moments(images.flip(-1)), *rest
            bar.update(len(labels))

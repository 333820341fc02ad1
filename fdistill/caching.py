"""Images encoded once by a latent teacher's autoencoder: what `data=FOLDER` then reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fdistill.adapters import load_denoiser, resolve_checkpoint
from fdistill.data import ImageLoader, Source, open_source
from fdistill.data.latents import SAMPLING, write_latents
from fdistill.data.order import EpochOrder
from fdistill.devices import start, upload
from fdistill.errors import ArgumentError, did_you_mean
from fdistill.files import claim_folder
from fdistill.images import to_unit
from fdistill.latents import LatentSpace, attach_latent_space

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
    device: str = "auto",
) -> Path:
    """Encodes every image of a data set to moments (mean and standard deviation of its latents).

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
    checkpoint = resolve_checkpoint(teacher)
    denoiser = load_denoiser(checkpoint)
    latents = attach_latent_space(denoiser, checkpoint, vae)
    if latents is None:
        raise ArgumentError(f"teacher {str(teacher)!r}: makes pixels; pass the images to distill as they are")
    source = open_source(str(data))
    resolution = latents.factor * denoiser.sample_shape[-1]
    folder = claim_folder(Path(output))
    _, chosen = start(device)
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
        batches = _moments(loader, source, latents, batch_size, flip, chosen)
        write_latents(folder, batches, meta, source.num_classes)
        for name, reason in loader.skipped:
            tqdm.write(f"skipped {name}: {reason}")
    return Path(output)


def _moments(
    loader: ImageLoader, source: Source, latents: LatentSpace, batch_size: int, flip: bool, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
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
            yield latents.moments(images), labels
            if flip:
                yield latents.moments(images.flip(-1)), labels
            bar.update(int(kept.sum()))

"""Cached latents of an autoencoder: `fdistill cache` writes them, and runs of latent teachers read them.

They are a folder of latents-00000.safetensors, ... and latents.json, which says how they were made. Each file holds
moments [n, 2 C, h, w], float16 or float32 (the mean and then the standard deviation of the autoencoder's own latents,
before any scaling), and labels int64 [n]. Latents in aspect-ratio buckets have several shapes, each in files of its
own; latents.json says how many of which shape follow one another. If the images have captions, the folder text/ holds
each distinct caption in encoded form (see data/embeddings.py), and the files above hold the number of each image's
caption, captions int64 [n].
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fdistill.base.errors import DataError
from fdistill.base.files import atomic_folder, read_json_object
from fdistill.base.hashes import check_files, check_seal, noted_files, sealed
from fdistill.base.rng import Stream, derived_seed, indexed_normal, world
from fdistill.data.embeddings import Captions, EmbeddingSource
from fdistill.data.source import PerProcess, class_labels

META_FILE = "latents.json"
META_KEYS = ("vae", "latent_scale", "latent_bias", "pixel_range", "sampling", "recipe", "resolution", "source", "flip")
SAMPLING = ("mean", "sample")

_TEXT = "text"
_SHARD_BYTES = 2**28


class LatentSource:
    """Cached latents by index, read where they are needed.

    Attributes:
        meta: the content of latents.json.
        labels: int64 [N], zeros if the data set had none.
        num_classes: None if the data set had no labels.
        shape: (C, h, w) of a latent; None where they have several.
        buckets: of latents in several shapes, each shape and how many have it, in the order of the rows; else None.
        text: the encoded captions of the N images; None if the data set had none.

    Args:
        folder: written by `write_latents`.
        seed: of the noise that is drawn if meta["sampling"] is "sample".

    Raises:
        DataError: the folder is incomplete or damaged.
    """

    def __init__(self, folder: Path, seed: int = 0):
        self.name, self._seed = str(folder), seed
        try:
            # Latents of before the range was noted were all made from images in [-1, 1].
            self.meta = {"pixel_range": [-1.0, 1.0]} | read_json_object(folder / META_FILE)
            files, counts = list(self.meta["shards"]), [int(count) for count in self.meta["shards"].values()]
            self.num_classes: int | None = self.meta["num_classes"]
            total = int(self.meta.get("count", sum(counts)))
            missing = [key for key in META_KEYS if key not in self.meta]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"latents {folder}: {META_FILE} cannot be read ({error}); make them again with fdistill cache"
            ) from error
        if missing or self.meta["sampling"] not in SAMPLING or any(Path(file).name != file for file in files):
            raise DataError(
                f"latents {folder}: {META_FILE} lacks {', '.join(missing) or 'a known sampling or plain file names'}; "
                "make them again with fdistill cache"
            )
        self._shards = [PerProcess(partial(_open, folder / file)) for file in files]
        self._ends = list(accumulate(counts))
        shapes: list[tuple[int, ...]] = []
        labels, captions = [], []
        for file, shard, count in zip(files, self._shards, counts, strict=True):
            try:
                shape = shard.get().get_slice("moments").get_shape()
                labels.append(shard.get().get_tensor("labels"))
                if "captions" in shard.get().keys():  # noqa: SIM118 (no mapping)
                    captions.append(shard.get().get_tensor("captions"))
            except (OSError, SafetensorError) as error:
                raise DataError(f"latents {folder}: {file} is damaged ({error}); make them again") from error
            if len(shape) != 4 or shape[0] != count or shape[1] % 2 or labels[-1].shape != (count,):
                raise DataError(f"latents {folder}: {file} has moments {shape}; expected [{count}, 2 C, h, w]")
            shapes.append((shape[1] // 2, *shape[2:]))
        self.buckets = _buckets(folder, self.meta, shapes, counts)
        self.shape = shapes[0] if self.buckets is None else None
        self._shapes = shapes
        self.labels = torch.cat(labels)
        self.text = _captions(folder, captions, len(self.labels))
        _check_written(folder, self.meta, total == sum(counts))

    def __len__(self) -> int:
        return len(self.labels)

    def shape_of(self, row: int) -> tuple[int, ...]:
        """(C, h, w) of a latent."""
        return self._shapes[bisect_right(self._ends, row)]

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation), float32 [len(rows), C, h, w], of rows that have one shape."""
        parts = []
        for row in rows.tolist():
            shard = bisect_right(self._ends, row)
            first = self._ends[shard - 1] if shard else 0
            parts.append(self._shards[shard].get().get_slice("moments")[row - first].float())
        mean, std = torch.stack(parts).chunk(2, dim=1)
        return mean, std

    def latent(self, rows: Tensor, draw: int) -> Tensor:
        """Latents, float32 [B, C, h, w]: mean + std noise, or the mean alone if meta["sampling"] is "mean".

        Args:
            rows: int64 [B].
            draw: the number of the batch. The noise of a row depends on (seed, draw, row) alone.
        """
        mean, std = self.moments(rows)
        if self.meta["sampling"] == "mean":
            return mean
        seed = derived_seed(self._seed, Stream.LATENT, draw)
        return mean + std * indexed_normal(seed, rows.tolist(), self.shape_of(int(rows[0])))


class LatentBucket(NamedTuple):
    """So many latents of one shape, of images of height x width pixels."""

    height: int
    width: int
    images: int
    shape: tuple[int, ...]  #: (C, h, w)


#: (moments [B, 2 C, h, w], labels int64 [B]), with captions also which of the prompts each image has, int64 [B].
Moments = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def write_latents(
    folder: Path,
    batches: Iterable[Moments],
    meta: Mapping[str, Any],
    num_classes: int | None,
    write_text: Callable[[Path], None] | None = None,
) -> None:
    """Writes a folder for `LatentSource`, whole or not at all.

    Args:
        folder: to be made, or replaced.
        batches: (moments float16 or float32 [B, 2 C, h, w], labels int64 [B]), on any device; with `write_text` also
            the number of each image's prompt, int64 [B].
        meta: the META_KEYS, and "buckets", (height, width, count) of each, where batches of different shapes follow one
            another. "latent_scale" and "latent_bias" are noted here, and applied when latents are read.
        num_classes: None for a data set without labels.
        write_text: writes the folder of the prompts' embeddings, as `partial(write_embeddings, batches=..., ...)` does.
            It is called before the first batch is asked for.

    Raises:
        DataError: meta lacks a key, moments are of another shape or not finite, there are no images, or an image has no
            prompt.
        OutputError: the folder cannot be written.
    """
    missing = [key for key in META_KEYS if key not in meta]
    if missing or meta["sampling"] not in SAMPLING:
        raise DataError(f"latents: meta lacks {', '.join(missing) or 'a known sampling'}; expected {META_KEYS}")
    with atomic_folder(folder) as temporary:
        prompts = None
        if write_text is not None:
            write_text(temporary / _TEXT)
            prompts = len(EmbeddingSource(temporary / _TEXT))
        shards = {}
        for number, shard in enumerate(_shards(batches, prompts)):
            name = f"latents-{number:05d}.safetensors"
            save_file(shard, temporary / name)
            shards[name] = len(shard["labels"])
        if not shards:
            raise DataError("latents: no images to encode; expected at least one")
        counted = {"num_classes": num_classes, "count": sum(shards.values()), "shards": shards}
        described = sealed({**meta, **counted, "files": noted_files(temporary, shards)})
        (temporary / META_FILE).write_text(json.dumps(described, indent=1), encoding="utf-8")


def check_latents(meta: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises DataError if `meta` differs from `wanted` in any key that `wanted` has."""
    for key, value in json.loads(json.dumps(dict(wanted))).items():  # as it would be read: tuples become lists
        if meta.get(key) != value:
            raise DataError(
                f"cached latents: {key} is {meta.get(key)!r}, but this run needs {value!r}; make them again with "
                "fdistill cache, or change the run's setting"
            )


def _check_written(folder: Path, meta: Mapping[str, Any], counts_agree: bool) -> None:
    """Raises DataError unless the folder is what was written. Each process reads its share of the files once more, at
    1.7 GB a second from memory, or as fast as the disk is. Folders of earlier versions have no hashes.
    """
    rank, processes = world()
    try:
        if not counts_agree:
            raise ValueError(f"the count in {META_FILE} is not the sum of its files'")
        check_seal(meta, META_FILE)
        check_files(folder, dict(list(meta.get("files", {}).items())[rank::processes]))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"latents {folder}: {error}; make them again with fdistill cache") from error


def _buckets(
    folder: Path, meta: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], counts: Sequence[int]
) -> list[LatentBucket] | None:
    """The buckets that latents.json names, whose files have these shapes and counts; DataError if they do not fit."""
    listed = meta.get("buckets")
    if listed is None:
        if len(set(shapes)) != 1:
            raise DataError(f"latents {folder}: files hold latents of shapes {sorted(set(shapes))}; make them again")
        return None
    found: dict[tuple[int, ...], int] = {}
    for shape, count in zip(shapes, counts, strict=True):
        found[shape] = found.get(shape, 0) + count
    try:
        buckets = [
            LatentBucket(int(height), int(width), int(count), shape)
            for (height, width, count), shape in zip(listed, found, strict=True)
        ]
    except (TypeError, ValueError):
        buckets = []
    if [each.images for each in buckets] != list(found.values()):
        raise DataError(
            f"latents {folder}: {META_FILE} lists buckets {listed}, but the files hold {list(found.items())}; make "
            "them again with fdistill cache"
        )
    return buckets


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _captions(folder: Path, index: list[Tensor], count: int) -> Captions | None:
    if not index and not (folder / _TEXT).exists():
        return None
    embeddings, joined = EmbeddingSource(folder / _TEXT), torch.cat([torch.empty(0, dtype=torch.long), *index])
    if joined.shape != (count,) or not _in_range(joined, len(embeddings)):
        raise DataError(
            f"latents {folder}: numbers of {len(joined)} captions for {count} images; expected one each, from 0 to "
            f"{len(embeddings) - 1}; make them again"
        )
    return Captions(embeddings, joined)


def _in_range(index: Tensor, count: int) -> bool:
    return index.dtype == torch.long and bool(((index >= 0) & (index < count)).all())


def _shards(batches: Iterable[Moments], prompts: int | None) -> Iterator[dict[str, Tensor]]:
    """Checks batches and joins them to about _SHARD_BYTES each, those of another shape apart; `prompts` is the number
    of encoded captions.
    """
    held: list[dict[str, Tensor]] = []
    for moments, labels, *captions in batches:
        if moments.ndim != 4 or moments.shape[1] % 2 or moments.dtype not in (torch.float16, torch.float32):
            raise DataError(
                f"latents: moments are {moments.dtype} {list(moments.shape)}; expected [B, 2 C, h, w] of float16 or "
                "float32"
            )
        if not bool(torch.isfinite(moments).all()):
            raise DataError("latents: the autoencoder's moments are not finite; encode in float32")
        if held and held[-1]["moments"].shape[1:] != moments.shape[1:]:
            yield _joined(held)
            held = []
        held.append({"moments": moments.cpu(), "labels": class_labels(labels, len(moments), "latents")[0]})
        if len(captions) != (prompts is not None):
            raise DataError(
                "latents: got encoded captions or their numbers, but not the other of the two; expected both or neither"
            )
        for index in captions:
            if index.shape != (len(moments),) or not _in_range(index, prompts or 0):
                raise DataError(
                    f"latents: caption numbers {index.dtype} {list(index.shape)} for {len(moments)} images; expected "
                    f"one int64 each, below {prompts}"
                )
            held[-1]["captions"] = index.cpu()
        if len(held) * math.prod(moments.shape) * moments.element_size() >= _SHARD_BYTES:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(held: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in held]).contiguous() for name in held[0]}

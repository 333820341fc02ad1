"""Features of images, extracted batch by batch by all processes together: one row for each image, or moments of all.

A network's features depend in their last bits on the batch that an image is in. Batches therefore begin at multiples of
the batch size for every number of processes.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from evaluation.extractors import Extractor, full_precision
from evaluation.images import Images
from evaluation.metrics.moments import Moments
from fdistill.base import rng
from fdistill.base.distributed import exchanging
from fdistill.base.errors import OutputError
from fdistill.base.files import atomic_file, cache_path
from fdistill.base.hashes import hashed_tensors, save_hashed

#: Features float32 [N, D] by "label.output", as "inception.pool".
Rows = dict[str, Tensor]
#: Encodes prompts: N texts -> float32 [N, D].
EncodeText = Callable[[Sequence[str]], Tensor]
#: Shapes of tensors in a file, by name.
Shapes = dict[str, tuple[int, ...]]

_T = TypeVar("_T")
_TEXTS = 256  # prompts encoded at once
_AHEAD = 2  # batches that are read ahead while one is in the extractors


@dataclass(frozen=True)
class Reading:
    """An extractor and the images that it reads.

    Attributes:
        label: what stands before the dot in names of features: the extractor's name, and "@view" behind it if the
            images are a view other than the protocol's own.
    """

    label: str
    extractor: Extractor
    images: Images

    @property
    def widths(self) -> dict[str, int]:
        """{"label.output": number of features}."""
        return {f"{self.label}.{output}": width for output, width in self.extractor.outputs.items()}


@dataclass(frozen=True)
class Extraction:
    """How images pass through extractors.

    Attributes:
        batch_size: images at a time.
        device: where the extractors are.
        describe: what the progress bar says; empty for no bar.
    """

    batch_size: int
    device: torch.device
    describe: str = "features"


def extract_rows(readings: Sequence[Reading], extraction: Extraction) -> Rows:
    """Features of all images in their order, the same on all processes. Every view of an image is read once.

    Args:
        readings: of views of the same N images.

    Returns:
        {"label.output": float32 [N, D]} on the CPU.
    """
    count, batch_size = len(readings[0].images), extraction.batch_size
    share = _share(count, batch_size)
    rows: Rows = {}
    for part, found in _stream(readings, share, extraction):
        here = slice(part.start - share.start, part.stop - share.start)
        for name, values in found.items():
            if name not in rows:
                rows[name] = torch.empty(len(share), values.shape[1])
            rows[name][here] = values
    widths = {name: width for reading in readings for name, width in reading.widths.items()}
    local = {name: rows.get(name, torch.empty(0, width)) for name, width in sorted(widths.items())}
    return {name: _gathered(values, count, batch_size, extraction.device) for name, values in local.items()}


def extract_texts(
    prompts: Sequence[str], encode: EncodeText, *, device: torch.device, describe: str = "prompts"
) -> Tensor:
    """Features float32 [N, D] of prompts in their order, on the CPU and the same on all processes.

    A prompt that is in the list several times is encoded once.
    """
    different = list(dict.fromkeys(prompts))
    share = _share(len(different), _TEXTS)
    quiet = rng.world()[0] != 0 or not describe
    parts = [] if share else [encode(different[:1])[:0]]  # 0 rows, of the right width
    with tqdm(total=len(share), desc=describe, unit="prompt", disable=quiet, mininterval=0.5) as bar:
        for first in range(0, len(share), _TEXTS):
            part = share[first : first + _TEXTS]
            parts.append(encode(different[part.start : part.stop]))
            bar.update(len(part))
    numbers = {prompt: number for number, prompt in enumerate(different)}
    return _gathered(torch.cat(parts), len(different), _TEXTS, device)[[numbers[prompt] for prompt in prompts]]


def extract_moments(readings: Sequence[Reading], extraction: Extraction) -> dict[str, Moments]:
    """Mean and covariance of the features of all images in float64; rows are not kept in memory."""
    moments = {name: Moments(width) for reading in readings for name, width in reading.widths.items()}
    share = _share(len(readings[0].images), extraction.batch_size)
    for _, found in _stream(readings, share, extraction):
        for name, values in found.items():
            moments[name].update(values)
    return {name: values.over_processes() for name, values in moments.items()}


def cached_rows(readings: Sequence[Reading], extraction: Extraction) -> Rows:
    """`extract_rows`, kept on disk if the images have a hash. It warns if the cache folder cannot be written."""

    def extract(missing: Sequence[Reading]) -> Rows:
        return extract_rows(missing, extraction)

    def shapes(reading: Reading) -> Shapes:
        return {name: (len(reading.images), width) for name, width in reading.extractor.outputs.items()}

    return _cached(readings, "rows", shapes, extract, extraction)


def cached_moments(readings: Sequence[Reading], extraction: Extraction) -> dict[str, Moments]:
    """`extract_moments`, kept on disk in the same way."""

    def extract(missing: Sequence[Reading]) -> Rows:
        made = extract_moments(missing, extraction)
        means = {f"{name}.mean": moments.mean for name, moments in made.items()}
        return means | {f"{name}.covariance": moments.covariance for name, moments in made.items()}

    def shapes(reading: Reading) -> Shapes:
        widths = reading.extractor.outputs.items()
        means: Shapes = {f"{name}.mean": (width,) for name, width in widths}
        return means | {f"{name}.covariance": (width, width) for name, width in widths}

    found = _cached(readings, "moments", shapes, extract, extraction)
    return {
        name: Moments.known(found[f"{name}.mean"], found[f"{name}.covariance"], len(reading.images))
        for reading in readings
        for name in reading.widths
    }


def _cached(
    readings: Sequence[Reading],
    kind: str,
    shapes: Callable[[Reading], Shapes],
    extract: Callable[[Sequence[Reading]], Rows],
    extraction: Extraction,
) -> Rows:
    """What `extract` returns for the readings, {"label.name": tensor}, read from cache files with these shapes if there
    are any.
    """
    files = {reading.label: _cache_file(reading, kind, extraction.batch_size) for reading in readings}
    tensors: Rows = {}
    missing = []
    for reading in readings:
        file = files[reading.label]
        found = None if file is None else _read_cache(file, shapes(reading))
        tensors.update({f"{reading.label}.{name}": tensor for name, tensor in (found or {}).items()})
        if found is None:
            missing.append(reading)
    if rng.world()[1] > 1:
        # Processes extract together: if one has not found a file that the others have, all must extract.
        absent = torch.tensor([float(reading in missing) for reading in readings], device=extraction.device)
        dist.all_reduce(absent, dist.ReduceOp.MAX)
        missing = [reading for reading, flag in zip(readings, absent.tolist(), strict=True) if flag]
    if not missing:
        return tensors
    new = extract(missing)
    for reading in missing:
        file = files[reading.label]
        if file is not None and rng.world()[0] == 0:
            _write_cache(file, {name: new[f"{reading.label}.{name}"] for name in shapes(reading)})
    return tensors | new


def _share(count: int, batch_size: int) -> range:
    """The images of this process: whole batches, and for the last process what is left."""
    rank, processes = rng.world()
    return range(count)[slice(*_bounds(count, batch_size, rank, processes))]


def _bounds(count: int, batch_size: int, rank: int, processes: int) -> tuple[int, int]:
    batches = -(-count // batch_size)
    per_process = -(-batches // processes) * batch_size
    return min(count, rank * per_process), min(count, (rank + 1) * per_process)


def _stream(readings: Sequence[Reading], share: range, extraction: Extraction) -> Iterator[tuple[range, Rows]]:
    """Yields (indices, {name: rows}) batch by batch, while a thread reads or generates the next batches."""
    batch_size, describe = extraction.batch_size, extraction.describe
    views = {id(reading.images): reading.images for reading in readings}
    quiet = rng.world()[0] != 0 or not describe
    parts = [share[first : first + batch_size] for first in range(0, len(share), batch_size)]
    batches = ((part, {key: images.read(part) for key, images in views.items()}) for part in parts)
    # Precision is a setting of the whole process, so it is set for both threads at once, before either starts.
    with (
        full_precision(extraction.device),
        tqdm(total=len(share), desc=describe, unit="img", disable=quiet, mininterval=0.5) as bar,
    ):
        for part, seen in ahead(batches):
            found = {
                f"{reading.label}.{name}": rows
                for reading in readings
                for name, rows in reading.extractor.run(seen[id(reading.images)]).items()
            }
            yield part, found
            bar.update(len(part))


def ahead(items: Iterable[_T], depth: int = _AHEAD) -> Iterator[_T]:
    """Yields the items, which a thread makes up to `depth` ahead; an error in that thread is raised here."""
    done = object()
    line: queue.Queue[object] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                line.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(done)
        except BaseException as error:
            put(_Raised(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := line.get()) is not done:
            if isinstance(item, _Raised):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


class _Raised:
    def __init__(self, error: BaseException):
        self.error = error


def _gathered(rows: Tensor, count: int, batch_size: int, device: torch.device) -> Tensor:
    """The rows of all processes, each of which has the rows of its `_share`."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    processes = dist.get_world_size()
    gathered = torch.empty(count, rows.shape[1])
    for rank in range(processes):
        first, last = _bounds(count, batch_size, rank, processes)
        part = rows if rank == dist.get_rank() else torch.empty(last - first, rows.shape[1])
        sent = part.to(device)
        if len(sent):
            with exchanging():
                dist.broadcast(sent, rank)
        gathered[first:last] = sent.cpu()
    return gathered


def _cache_file(reading: Reading, kind: str, batch_size: int) -> Path | None:
    content, extractor = reading.images.sha256(), reading.extractor
    if content is None or not extractor.sha256:
        return None
    facts = [kind, content, len(reading.images), extractor.name, extractor.sha256, extractor.preparation, batch_size]
    return cache_path("features", f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors")


def _read_cache(file: Path, shapes: Shapes) -> Rows | None:
    try:
        found = dict(hashed_tensors(file))
    except (OSError, SafetensorError, ValueError):
        return None
    return found if {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes else None


def _write_cache(file: Path, tensors: Rows) -> None:
    try:
        with atomic_file(file) as temporary:
            save_hashed(tensors, temporary)
    except OutputError as error:
        warnings.warn(
            f"features are not kept: {error}; set FDISTILL_CACHE to a folder that can be written", stacklevel=2
        )

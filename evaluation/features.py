"""Images through extractors, batch by batch: rows of features, or their moments, of all processes together.

Batches begin at multiples of the batch size whatever the number of processes, as a network's features differ in their
last bits with the batch that an image is in.
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from evaluation.extractors import Extractor, full_precision
from evaluation.images import Images
from evaluation.metrics.moments import Moments
from fdistill.base import rng
from fdistill.base.errors import OutputError
from fdistill.base.files import atomic_file, cache_path

#: By "label.output", as "inception.pool".
Rows = dict[str, Tensor]
#: What encodes prompts: N texts -> float32 [N, D].
EncodeText = Callable[[Sequence[str]], Tensor]
#: Of tensors in a file, by name.
Shapes = dict[str, tuple[int, ...]]

_T = TypeVar("_T")
_TEXTS = 256  # encoded at once
_AHEAD = 2  # batches that are read while one is in the extractors


@dataclass(frozen=True)
class Reading:
    """An extractor and the images it looks at: those of a protocol, or another view of them.

    Attributes:
        label: before the dot in names of features: the extractor's name, with "@view" where it has one of its own.
    """

    label: str
    extractor: Extractor
    images: Images

    @property
    def widths(self) -> dict[str, int]:
        """{"label.output": number of features}."""
        return {f"{self.label}.{output}": width for output, width in self.extractor.outputs.items()}


def extract_rows(
    readings: Sequence[Reading],
    *,
    batch_size: int,
    device: torch.device,
    describe: str = "features",
) -> Rows:
    """Features of all images in their order, the same on all processes; every view of an image is read once.

    Args:
        readings: of views of the same images.
        describe: what the progress bar says; empty for none.

    Returns:
        {"label.output": float32 [N, D]} on the CPU.
    """
    count = len(readings[0].images)
    share = _share(count, batch_size)
    rows: Rows = {}
    for part, found in _stream(readings, share, batch_size, device, describe):
        here = slice(part.start - share.start, part.stop - share.start)
        for name, values in found.items():
            if name not in rows:
                rows[name] = torch.empty(len(share), values.shape[1])
            rows[name][here] = values
    widths = {name: width for reading in readings for name, width in reading.widths.items()}
    local = {name: rows.get(name, torch.empty(0, width)) for name, width in sorted(widths.items())}
    return {name: _gathered(values, count, batch_size, device) for name, values in local.items()}


def extract_texts(
    prompts: Sequence[str], encode: EncodeText, *, device: torch.device, describe: str = "prompts"
) -> Tensor:
    """Features float32 [N, D] of prompts in their order, on the CPU and the same on all processes; those that are there
    several times are encoded once.
    """
    different = list(dict.fromkeys(prompts))
    share = _share(len(different), _TEXTS)
    quiet = rng.world()[0] != 0 or not describe
    parts = [] if share else [encode(different[:1])[:0]]  # none, as wide as the others'
    with tqdm(total=len(share), desc=describe, unit="prompt", disable=quiet, mininterval=0.5) as bar:
        for first in range(0, len(share), _TEXTS):
            part = share[first : first + _TEXTS]
            parts.append(encode(different[part.start : part.stop]))
            bar.update(len(part))
    numbers = {prompt: number for number, prompt in enumerate(different)}
    return _gathered(torch.cat(parts), len(different), _TEXTS, device)[[numbers[prompt] for prompt in prompts]]


def extract_moments(
    readings: Sequence[Reading], *, batch_size: int, device: torch.device, describe: str = "features"
) -> dict[str, Moments]:
    """Mean and covariance of all images' features, in float64; no row is kept."""
    moments = {name: Moments(width) for reading in readings for name, width in reading.widths.items()}
    share = _share(len(readings[0].images), batch_size)
    for _, found in _stream(readings, share, batch_size, device, describe):
        for name, values in found.items():
            moments[name].update(values)
    return {name: values.over_processes() for name, values in moments.items()}


def cached_rows(readings: Sequence[Reading], *, batch_size: int, device: torch.device, describe: str) -> Rows:
    """`extract_rows`, kept on disk for images whose content is known; an unwritable cache costs a warning."""

    def extract(missing: Sequence[Reading]) -> Rows:
        return extract_rows(missing, batch_size=batch_size, device=device, describe=describe)

    def shapes(reading: Reading) -> Shapes:
        return {name: (len(reading.images), width) for name, width in reading.extractor.outputs.items()}

    return _cached(readings, "rows", shapes, extract, batch_size, device)


def cached_moments(
    readings: Sequence[Reading], *, batch_size: int, device: torch.device, describe: str
) -> dict[str, Moments]:
    """`extract_moments`, kept in the same way."""

    def extract(missing: Sequence[Reading]) -> Rows:
        made = extract_moments(missing, batch_size=batch_size, device=device, describe=describe)
        means = {f"{name}.mean": moments.mean for name, moments in made.items()}
        return means | {f"{name}.covariance": moments.covariance for name, moments in made.items()}

    def shapes(reading: Reading) -> Shapes:
        widths = reading.extractor.outputs.items()
        means: Shapes = {f"{name}.mean": (width,) for name, width in widths}
        return means | {f"{name}.covariance": (width, width) for name, width in widths}

    found = _cached(readings, "moments", shapes, extract, batch_size, device)
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
    batch_size: int,
    device: torch.device,
) -> Rows:
    """What `extract` makes of readings, as "label.name", from files where they hold tensors of these shapes."""
    files = {reading.label: _cache_file(reading, kind, batch_size) for reading in readings}
    tensors: Rows = {}
    missing = []
    for reading in readings:
        file = files[reading.label]
        found = None if file is None else _read_cache(file, shapes(reading))
        tensors.update({f"{reading.label}.{name}": tensor for name, tensor in (found or {}).items()})
        if found is None:
            missing.append(reading)
    if rng.world()[1] > 1:
        # Every process must take the same way: where one has not found a file that another has, all extract.
        absent = torch.tensor([float(reading in missing) for reading in readings], device=device)
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
    """This process's images: whole batches, the last process's being the ones that are left."""
    rank, processes = rng.world()
    return range(count)[slice(*_bounds(count, batch_size, rank, processes))]


def _bounds(count: int, batch_size: int, rank: int, processes: int) -> tuple[int, int]:
    batches = -(-count // batch_size)
    per_process = -(-batches // processes) * batch_size
    return min(count, rank * per_process), min(count, (rank + 1) * per_process)


def _stream(
    readings: Sequence[Reading],
    share: range,
    batch_size: int,
    device: torch.device,
    describe: str,
) -> Iterator[tuple[range, Rows]]:
    """(indices, {name: rows}) of one batch after another, while the next ones are read or generated in a thread."""
    views = {id(reading.images): reading.images for reading in readings}
    quiet = rng.world()[0] != 0 or not describe
    parts = [share[first : first + batch_size] for first in range(0, len(share), batch_size)]
    batches = ((part, {key: images.read(part) for key, images in views.items()}) for part in parts)
    # Around both threads: precision is a setting of the whole process, and images must not depend on who was first.
    with (
        full_precision(device),
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
    """The items, made in a thread up to `depth` ahead of their use; an error in the thread is raised here."""
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
    """The rows of all processes, of which each has its own number."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    processes = dist.get_world_size()
    gathered = torch.empty(count, rows.shape[1])
    for rank in range(processes):
        first, last = _bounds(count, batch_size, rank, processes)
        part = rows if rank == dist.get_rank() else torch.empty(last - first, rows.shape[1])
        sent = part.to(device)
        if len(sent):
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
        found = load_file(file)
    except (OSError, SafetensorError):
        return None
    return found if {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes else None


def _write_cache(file: Path, tensors: Rows) -> None:
    try:
        with atomic_file(file) as temporary:
            save_file(tensors, temporary)
    except OutputError as error:
        warnings.warn(
            f"features are not kept: {error}; set FDISTILL_CACHE to a folder that can be written", stacklevel=2
        )
